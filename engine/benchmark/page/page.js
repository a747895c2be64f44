// Draws the page's figures in its own colours, those of a chosen load when it is chosen, and again when colours change.
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = matchMedia("(pointer: coarse)").matches; // there a finger on a figure scrolls the page
  const drawn = [];

  function ink(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function colours() {
    const axis = { gridcolor: ink("--line"), linecolor: ink("--line"), tickcolor: ink("--line") };
    const set = {
      "font.color": ink("--ink"), "font.family": "system-ui, sans-serif",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      "hoverlabel.bgcolor": ink("--paper"), "hoverlabel.bordercolor": ink("--line"), "hoverlabel.font.color": ink("--ink"),
    };
    for (const name of ["xaxis", "yaxis"]) {
      for (const [key, value] of Object.entries(axis)) set[`${name}.${key}`] = value;
    }
    return set;
  }

  function put(layout, set) {
    for (const [path, value] of Object.entries(set)) {
      const names = path.split(".");
      const last = names.pop();
      names.reduce((part, name) => (part[name] ??= {}), layout)[last] = value;
    }
    return layout;
  }

  function draw(div) {
    const { data, layout } = figures[div.id];
    put(layout, colours());
    layout.dragmode = narrow ? false : "zoom";
    Plotly.newPlot(div, data, layout, { responsive: true, displayModeBar: false });
    drawn.push(div);
  }

  function drawShown(root) {
    for (const div of root.querySelectorAll(".plot")) {
      if (!drawn.includes(div) && div.closest("[hidden]") === null) draw(div);
    }
  }

  for (const select of document.querySelectorAll(".picker select")) {
    const section = select.closest("section");
    select.addEventListener("change", () => {
      section.querySelectorAll(".choice").forEach((block, place) => { block.hidden = place !== select.selectedIndex; });
      drawShown(section);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const div of drawn) Plotly.relayout(div, colours());
  });
  drawShown(document);
})();
