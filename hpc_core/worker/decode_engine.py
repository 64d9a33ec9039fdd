"""What is particular to measuring the graph engine: its program, the facts that it is what ran, its logits beside the stock path's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hpc_core.audit.attention import attention_families
from hpc_core.builders import Built
from hpc_core.case.case import GenerateSpec
from hpc_core.engines.capture import make_workspace
from hpc_core.engines.decode.program import GraphProgram, graph_program
from hpc_core.engines.generate import GenerateProgram, generate_program
from hpc_core.record.record import Fact
from hpc_core.worker.metrics import measured_bytes, ratio, reported
from hpc_core.worker.session import Session

__all__ = [
    "compare_with_stock",
    "engine_facts",
    "engine_itself",
    "engine_logits",
    "is_captured",
    "operator_by_operator",
    "program_of",
]


def program_of(session: Session, built: Built, workload: GenerateSpec) -> GenerateProgram:
    """The program that the workload's engine gives, its first-use seconds and choices noted.

    Raises:
        DataError: the data has fewer prompts than asked for.
        SpecError: the graph engine does not know this model.
    """
    if workload.engine == "stock":
        return generate_program(built, workload)
    program = graph_program(built, workload, seed=session.case.seed)
    for name, seconds in program.first_use_s.items():
        session.metrics[f"first_use_{name}_s"] = reported(seconds, "s", note="once a process")
    if program.captured is not None:
        pools = {"graph": program.captured.hidden_bytes, "first_token": program.first_tokens.hidden_bytes}
        for name, of in (("graph", "a captured token"), ("first_token", "captured prefills")):
            session.metrics[f"{name}_pool_bytes"] = measured_bytes(
                pools[name], machine=True, note=f"of {of}; the larger of two is part of every peak"
            )
    if program.captured is not None and program.first_tokens.why_not:
        session.notes.append(f"engine: prefills run without a graph: {program.first_tokens.why_not}")
    if program.why_eager is not None:
        session.notes.append(f"engine: {program.why_eager}")
    session.notes += [f"engine: {name} runs with {text} each" for name, text in program.chosen_blocks.items()]
    return program


def is_captured(program: GenerateProgram) -> bool:
    """Whether its tokens are replays of a graph."""
    return isinstance(program, GraphProgram) and program.captured is not None


@contextlib.contextmanager
def operator_by_operator(program: GenerateProgram) -> Iterator[None]:
    """In the block first tokens are no replays: whoever lays memory into categories sees every allocation."""
    program.watched = True
    if is_captured(program):
        make_workspace(program.device)  # which replays let go. It is nobody's, as in any other case, and no activation
    try:
        yield
    finally:
        program.watched = False


def engine_itself(session: Session, program: GenerateProgram) -> dict[str, Fact]:
    """The engine that is there, by the program itself: whether it is captured, its kernels and its head. Runs nothing; {} where none was asked for."""
    if program.workload.engine == "stock":
        return {}
    if not isinstance(program, GraphProgram):
        return {"engine": Fact(asked="graph", seen="stock")}
    return {
        "engine": Fact(asked="graph", seen="graph"),
        "captured": Fact(asked=session.on_gpu, seen=program.captured is not None),
        "kernels": Fact(asked=program.workload.kernels if session.on_gpu else "torch", seen=program.step_of.kernels),
        "head": Fact(asked=program.workload.head, seen=program.step_of.head),
    }


def engine_facts(
    session: Session, program: GenerateProgram, operators: Mapping[str, int], *, new_tokens: int
) -> dict[str, Fact]:
    """The engine that ran, by the program itself and its counters on the device, after a query of `new_tokens`.

    Without CUDA nothing can be captured and torch's own operators are right; the record's notes say why.
    """
    if not isinstance(program, GraphProgram):
        return engine_itself(session, program)
    width = program.inputs[0]["input_ids"].shape[1]
    masks = [inputs["attention_mask"] for inputs in program.inputs]
    prefill = sorted(name for name in attention_families(operators) if name != "eager")
    facts = engine_itself(session, program) | {
        # A long prompt keeps a GPU busy without a graph, and many prompts get none.
        "captured_prefill": Fact(
            asked=session.on_gpu and program.first_tokens.worth_capturing, seen=program.first_tokens.all_replayed
        ),
        "steps": Fact(asked=new_tokens - 1, seen=program.replays),
        # The last token is handed out and never fed back.
        "cache_length": Fact(asked=width + new_tokens - 1, seen=int(program.cache.filled)),
        "training_mode": Fact(asked="off", seen="on" if program.model.training else "off"),
        "prompt_tokens": Fact(
            asked=sum(prompt.tokens for prompt in program.prompts), seen=int(sum(int(mask.sum()) for mask in masks))
        ),
        # Which kernel of torch's fused attention is its own choice: this fact shows it and always holds.
        "attention_kernel": Fact(asked=prefill, seen=prefill),
    }
    if session.case.adapter is not None:
        left = any(".lora_" in name for name, _ in program.model.named_parameters())
        facts["adapter"] = Fact(asked="merged", seen="beside its weights" if left else "merged")
    return facts


def engine_logits(session: Session, program: GenerateProgram, index: int, given: Any) -> torch.Tensor | None:
    """The engine's logits at the given answers; None for the stock engine, whose logits are the model's own.

    Run before the model is turned into the reference, since the engine reads the model's weights.
    """
    if not isinstance(program, GraphProgram) or not session.options.audit:
        return None
    rows, count = given.answers.shape
    fed = given.answers.new_zeros(program.workload.batch, count)
    fed[:rows] = given.answers  # other rows do not matter: no row sees another
    return program.logits_after(index, fed, rows)


def compare_with_stock(session: Session, engine: torch.Tensor, stock: torch.Tensor, answers: torch.Tensor) -> None:
    """The engine's logits and answers beside those of the model's own forward in the case's own precision.

    Both err; neither is right because it is stock. What decides is the float32 reference, these two numbers are shown.
    """
    error = float((engine - stock).norm() / stock.norm())
    session.metrics["logits_error_to_stock"] = reported(
        error, "ratio", note="relative to the stock forward, same precision"
    )
    if session.case.workload.temperature is None:  # type: ignore[union-attr]
        same = float((stock.argmax(-1) == answers).float().mean())
        session.metrics["stock_agreement"] = ratio(
            same, note=f"of {answers.numel()} tokens that the stock forward would choose too"
        )
