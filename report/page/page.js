"use strict";
// Draws every chart of the page in the colours of light, dark or print, and again when that changes.
// A chart's JSON names colours (meta.paint, meta.scale); the style sheet says what they are.
(() => {
  const root = document.documentElement;
  const PRINT_WIDTH = 680; // of a page of A4 or letter between its margins, in CSS pixels
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const charts = [...document.querySelectorAll("[data-figure]")].map((box) => ({
    box,
    spec: document.getElementById(box.dataset.figure).textContent,
  }));

  function theme(narrow) {
    const axis = {
      gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"), automargin: true,
      fixedrange: true, tickfont: { size: narrow ? 11 : 12 }, title: { font: { size: narrow ? 11 : 12.5 }, standoff: 10 },
    };
    return {
      layout: {
        font: { family: getComputedStyle(root).fontFamily, color: colour("soft"), size: narrow ? 11 : 12.5 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
        margin: { l: 8, r: 10, t: 20, b: 8 }, xaxis: axis, yaxis: axis, showlegend: false,
        legend: { orientation: "h", traceorder: "normal", x: 0, yref: "container", y: 1, yanchor: "top", font: { color: colour("ink") } },
        hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink") } },
        shapedefaults: { line: { color: colour("ink"), width: 1.5 } },
        annotationdefaults: { font: { color: colour("ink"), size: narrow ? 11 : 12 } },
        coloraxis: { colorbar: { outlinewidth: 0, tickcolor: colour("line"), tickfont: { size: 11 } } },
      },
    };
  }

  function paint(spec, narrow) {
    const figure = JSON.parse(spec);
    for (const trace of figure.data) {
      const named = trace.meta?.paint;
      if (named === undefined) continue;
      if (trace.type === "treemap") {
        trace.marker = { ...trace.marker, colors: named.map(colour), line: { color: colour("panel"), width: 2 } };
        trace.textfont = { color: named.map((name) => (name === "panel" ? colour("ink") : colour("panel"))) };
        continue;
      }
      trace.marker = { ...trace.marker, color: colour(named) };
      if (trace.line) trace.line.color = colour(named);
      for (const bars of [trace.error_x, trace.error_y]) if (bars) bars.color = colour(named);
    }
    const scale = figure.layout.meta?.scale;
    if (scale !== undefined) {
      const colours = colour(scale).split(/\s+/);
      figure.layout.coloraxis.colorscale = colours.map((c, i) => [i / (colours.length - 1), c]);
    }
    // Labels of a few words stand aslant where they would run into one another.
    if (narrow && figure.layout.xaxis?.type === "category") figure.layout.xaxis.tickangle = -40;
    figure.layout.template = theme(narrow);
    return figure;
  }

  async function draw(width) {
    const done = charts.map(({ box, spec }) => {
      const narrow = (width ?? box.clientWidth) < 520;
      const figure = paint(spec, narrow);
      if (width !== undefined) figure.layout.width = width;
      else figure.layout.autosize = true;
      const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };
      return Plotly.react(box, figure.data, figure.layout, config);
    });
    await Promise.all(done);
    root.dataset.drawn = String(done.length);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => { root.dataset.print = ""; draw(PRINT_WIDTH); });
  addEventListener("afterprint", () => { delete root.dataset.print; draw(); });
  draw();
})();
