"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Colours come from the style sheet, so that a chart follows the page's theme.
  const config = (width) => {
    const ink = colour("--fg"), dim = colour("--dim"), line = colour("--line");
    return {
      background: null, font: "system-ui, sans-serif", view: { stroke: null },
      axis: { gridColor: line, domainColor: dim, tickColor: dim, labelColor: ink, titleColor: dim, titleFontWeight: "normal", titleLimit: width * 0.9 },
      axisX: { labelOverlap: true, tickCount: width < 500 ? 4 : 8 },
      axisY: { labelLimit: width * 0.38 },
      legend: { labelColor: ink, titleColor: dim, labelLimit: width * 0.9, columns: width < 500 ? 2 : 4 },
      text: { fill: ink, fontSize: width < 500 ? 10 : 11 }, rule: { stroke: ink }, tick: { color: ink },
      style: {
        busy: { fill: ink, opacity: 0.55 }, quiet: { color: dim, stroke: dim }, roof: { color: ink, stroke: ink, strokeWidth: 1.2 }, over: { color: ink, stroke: ink },
        name: { opacity: width < 500 ? 0 : 1 }, // a finger shows it

      },
    };
  };
  // Vega may not compile code under this page's policy: "ast" interprets its expressions instead.
  const draw = (place) => vegaEmbed(place, structuredClone(specs[place.dataset.spec]), {
    mode: "vega-lite", ast: true, actions: false, defaultStyle: false, renderer: "canvas", config: config(place.clientWidth),
    tooltip: { disableDefaultStyle: true }, loader: { target: "_self" },
  }).then((result) => { place.chart?.finalize(); place.chart = result; });

  // A chart is drawn when it comes near the window.
  const watch = new IntersectionObserver((seen) => seen.forEach((each) => {
    if (each.isIntersecting) { watch.unobserve(each.target); draw(each.target); }
  }), { rootMargin: "600px" });
  const places = [...document.querySelectorAll(".vega")];
  places.forEach((place) => watch.observe(place));
  const redraw = () => places.filter((place) => place.chart).forEach(draw);
  document.addEventListener("theme", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => places.filter((place) => !place.chart).forEach(draw));
})();
