"""Steps as users write them: one trains a small model, the others cannot run on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Step = Callable[[], Any]


class TinyModel(nn.Module):
    """Embeddings, residual blocks, and a head that shares the embeddings' weights."""

    def __init__(self, vocabulary: int, width: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of (batch, length) ids."""
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def train(
    device: str, vocabulary: int = 512, width: int = 64, layers: int = 2, batch: int = 4, clip: bool = True
) -> Step:
    """A plain training step: the model is moved after construction, gradients are clipped, the loss is logged."""
    torch.manual_seed(0)
    model = TinyModel(vocabulary, width, layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    ids = torch.randint(0, vocabulary, (batch, 33)).to(device)
    log: list[str] = []

    def step() -> float:
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log[:] = [f"loss {loss:.3f}"]
        return loss.item() / 2

    return step


def picks_its_device(batch: int = 4) -> Step:
    """A step that chooses its device as most scripts do."""
    return train("cuda" if torch.cuda.is_available() else "cpu", batch=batch)


def stays_on_the_cpu() -> Step:
    """A step that never uses a GPU."""
    return train("cpu")


def optimizer_first(device: str) -> Step:
    """A step whose optimizer was made before its model was moved."""
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model.to(device)

    def step() -> None:
        model(torch.ones(2, 8, device=device)).sum().backward()
        optimizer.step()

    return step


def reads_values(what: str, device: str) -> Step:
    """A step that reads a tensor's value, in one of many ways."""
    values = torch.rand(4, 4, device=device)
    ways: dict[str, Callable[[], Any]] = {
        "branch on a tensor": lambda: 1 if (values > 0).any() else 2,
        "branch on a number": lambda: 1 if values.sum().item() > 3 else 2,
        "branch on a sum of numbers": lambda: 1 if sum(row.sum().item() for row in values) else 2,
        "range": lambda: range(int(values.sum())),
        "number of rows": lambda: range(values.sum().item()),  # type: ignore[arg-type]
        "best so far": lambda: max(1.0, values.sum().item()),
        "list": values.tolist,
        "numpy": lambda: values.cpu().numpy(),
        "membership": lambda: 1 in values,
        "rows of a mask": lambda: values[values > 0],
        "equal": lambda: torch.equal(values, values),
        "key of a dict": lambda: {values.sum().item(): 1},
        "raise": lambda: [][0],
    }
    return ways[what]


def convolves(device: str, dimensions: int) -> Step:
    """A step through a convolution over one or two dimensions."""
    kind = nn.Conv1d if dimensions == 1 else nn.Conv2d
    model = kind(4, 8, 3).to(device)
    values = torch.ones(2, 4, *[16] * dimensions, device=device)
    return lambda: model(values).sum().backward()


def scales_gradients(device: str) -> Step:
    """A step in float16 with a GradScaler and clipped gradients."""
    model = nn.Linear(16, 16).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler(device)
    values = torch.ones(2, 16, device=device)

    def step() -> None:
        with torch.autocast(device, dtype=torch.float16):
            loss = model(values).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def tiny_llama(device: str) -> Any:
    """A causal language model of two layers."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config).to(device)


def trains_with_mask(device: str, padded: int | None) -> Step:
    """A step on two rows of 16 tokens, the second with `padded` tokens of padding. None: without a mask."""
    model = tiny_llama(device)

    def step() -> None:
        ids = torch.ones(2, 16, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids}
        if padded is not None:
            batch["attention_mask"] = torch.tensor([[1] * 16, [1] * (16 - padded) + [0] * padded])
        model(**{name: rows.to(device) for name, rows in batch.items()}).loss.backward()
        model.zero_grad()

    return step


def generates(device: str, **options: Any) -> Step:
    """A step that calls `generate` for two prompts of 16 tokens."""
    model = tiny_llama(device).eval()
    ids = torch.ones(2, 16, dtype=torch.long, device=device)
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def loads(folder: str, device_map: str, nf4: bool = False) -> Step:
    """A step of a model that transformers loads onto the GPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, quantization_config=config)
    ids = torch.ones(2, 16, dtype=torch.long).to(model.device)
    return lambda: model(ids).logits


def adapts(device: str, method: str, **options: Any) -> Step:
    """A step of an adapter that peft makes."""
    import peft

    config = getattr(peft, method)(target_modules=["q_proj", "v_proj"], **options)
    model: Any = peft.get_peft_model(tiny_llama("cpu"), config).to(device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    ids = torch.ones(2, 16, dtype=torch.long, device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def asks_the_gpu(device: str, length: int = 1 << 20) -> Step:
    """A step that checks the answers of `torch.cuda`."""

    def step() -> None:
        cuda = torch.cuda
        free, total = cuda.mem_get_info()
        assert free == total - cuda.memory_reserved()
        large = torch.ones(length, dtype=torch.float32, device=device)
        assert cuda.memory_reserved() >= cuda.memory_allocated() >= 4 * length
        assert cuda.mem_get_info()[0] <= free
        del large
        assert cuda.max_memory_reserved() >= cuda.max_memory_allocated() >= 4 * length
        cuda.reset_peak_memory_stats()
        assert cuda.max_memory_allocated() < 4 * length
        assert cuda.memory_stats()["allocated_bytes.all.peak"] < 4 * length
        cuda.empty_cache()
        assert cuda.memory_reserved() < 4 * length
        cuda.set_rng_state(cuda.get_rng_state())
        began, ended = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        began.record()
        ended.record()
        cuda.synchronize()
        assert f"{began.elapsed_time(ended):.1f} ms" == "unknown ms"
        assert torch.accelerator.memory_allocated() == cuda.memory_allocated()

    return step


def reads_known_values(device: str) -> Step:
    """A step that decides by values which the host made: ids, a mask, a random number."""
    ids = torch.tensor([[3, 1, 2, 0], [4, 0, 0, 0]]).to(device)

    def step() -> None:
        mask = ids != 0
        lengths = mask.sum(1)
        assert lengths.tolist() == [3, 1]
        assert int(lengths.max()) == 3
        assert not mask.all()
        assert 4 in ids
        assert ids.cpu().numpy().sum() == 10
        assert ids[mask].shape == (4,)
        assert torch.equal(ids, ids.clone())
        assert mask.nonzero().shape == (4, 2)
        rows = ids[:, : lengths.max()]
        assert rows.shape == (2, 3)
        rows[1] = 5
        assert ids[1].tolist() == [5, 5, 5, 0]
        rows[1] = torch.tensor([4, 0, 0])
        assert torch.rand(1) < 2
        virtual = torch.ones(2, 3, device=device)  # peft's masks of virtual tokens are float32
        assert torch.cat((virtual, torch.ones_like(ids)), 1).all()

    return step


def trains_with_trainer(device: str, folder: str) -> Step:
    """A step that runs transformers' Trainer for two steps on rows of two lengths."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": [1] * 16, "labels": [1] * 16}] * 8
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True
    )

    def step() -> None:
        Trainer(tiny_llama("cpu"), arguments, train_dataset=rows).train()

    return step


def refuses_hooks() -> Step:
    """A step that raises while hooks are registered on every module."""
    linear = nn.Linear(8, 8)

    def step() -> None:
        if nn.modules.module._global_forward_hooks_always_called:
            raise RuntimeError("no hooks here\nand more")
        linear(torch.ones(2, 8))

    return step
