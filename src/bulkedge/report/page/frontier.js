"use strict";
(() => {
  const { draw, resolved } = charts;
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;

  // text never becomes markup: names come out of files and programs that strangers made
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
    node.append(...children.flat(Infinity).filter((x) => x !== null));
    return node;
  }
  const byId = (id) => document.getElementById(id);
  const fill = (id, ...children) => byId(id).replaceChildren(...children.flat(Infinity));
  /** Text for plotly, which takes some markup. */
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const ARMS = [["scaled", "scaled, by s", "square", "dash"], ["protected", "protected, by λ", "circle", "solid"]];
  const named = (name) => data.points.find((p) => p.name === name);

  function lines() {
    return ARMS.map(([arm, name, symbol, dash]) => {
      const shown = data.lines[arm].map(named), color = resolved(arm);
      return { type: "scatter", mode: "lines+markers+text", name, x: shown.map((p) => p.keep), y: shown.map((p) => p.task),
        text: shown.map((p) => p.arm === arm ? p.strength : ""), textposition: "top center", textfont: { color },
        customdata: shown.map((p) => p.name), line: { color, dash }, marker: { color, symbol, size: 9 },
        hovertemplate: "%{customdata}<br>task %{y:.4g}<br>kept %{x:.4g}<extra></extra>" };
    });
  }
  function ends() {
    return data.points.filter((p) => p.arm === "trained" || p.arm === "base").map((p) => ({ type: "scatter",
      mode: "markers+text", name: p.label, x: [p.keep], y: [p.task], text: [p.label], textposition: "bottom center",
      showlegend: false, marker: { size: 13, symbol: p.arm === "base" ? "diamond-open" : "star", color: resolved("ink") },
      hovertemplate: `${p.name}<br>task %{y:.4g}<br>kept %{x:.4g}<extra></extra>` }));
  }
  function chart() {
    const axis = ({ name, lower }) => ({ title: { text: plain(name) + (lower ? " (less is better)" : "") },
      autorange: lower ? "reversed" : true });
    draw(byId("chart"), { traces: [...lines(), ...ends()],
      layout: { showlegend: true, xaxis: axis(data.keep), yaxis: axis(data.task) } });
    byId("chart").setAttribute("aria-label", data.points.map((p) => `${p.name}: ${p.task}, ${p.keep}`).join("; "));
  }
  function table() {
    const head = el("tr", {}, data.columns.map((name) => el("th", { scope: "col" }, name)));
    const rows = data.points.map((p) => el("tr", { class: p.beaten ? "beaten" : null },
      el("td", {}, el("span", { class: `arm ${p.arm}` }, p.name)), p.cells.map((text) => el("td", {}, text))));
    fill("points", el("thead", {}, head), el("tbody", {}, rows));
  }
  function commands() {
    fill("commands", data.points.map((p) => [el("dt", {}, p.name),
      p.command === null ? null : el("dd", {}, el("code", {}, p.command)),
      el("dd", {}, "evaluated: ", el("code", {}, p.evaluated))].filter((x) => x !== null)));
  }

  fill("headline", data.headline);
  fill("explanation", data.explanation.join(" "));
  fill("about", data.about);
  table(); commands(); chart();
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    chart();
  });
})();
