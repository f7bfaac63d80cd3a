"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const VERDICTS = ["aligned", "rotated", "intruder", "undecided"];
  const CONFIG = { displaylogo: false, showSendToCloud: false, responsive: true,
    modeBarButtonsToRemove: ["sendChartToCloud", "lasso2d", "select2d"] };
  const state = { record: 0, sort: "worst", down: false, filter: "", only: "affected", side: null,
    open: null, colour: "score" };

  // ---- small things

  // text never becomes markup: names come out of files that strangers made
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
    return node;
  }
  const fill = (id, ...children) => document.getElementById(id).replaceChildren(...children.flat());
  const number = (x, digits = 2) => x === null || x === undefined ? "–" : Number(x).toFixed(digits);
  const record = () => data.records[state.record];
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const resolved = (name) => {  // light-dark() as the one that holds now
    const probe = el("span"); probe.style.color = `var(--${name})`; document.body.append(probe);
    const value = getComputedStyle(probe).color; probe.remove(); return value;
  };
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : (word.endsWith("x") ? "" : "s")}`;
  const matricesOf = (n) => n === 1 ? "1 matrix" : `${n} matrices`;

  // ---- the first screen

  function firstScreen() {
    const r = record(), s = r.summary;
    const affected = r.matrices.filter((m) => m.intruders > 0).length;
    const unsure = s.undecided + s.not_audited + s.lost;
    let told, kind = "";
    if (s.matrices > 0 && s.unchanged === s.matrices && !s.lost) told = "Nothing was changed: no matrix differs from the base";
    else if (s.intruders > 0) {
      told = `${plural(s.intruders, "new direction")} in ${matricesOf(affected)} of ${s.audited}`; kind = "bad";
    } else if (unsure) { told = "No new direction found, but not everything was judged"; kind = "unsure"; }
    else told = `No new direction in ${matricesOf(s.audited)}`;
    fill("verdict", el("p", { class: `verdict ${kind}` }, told),
      el("p", {}, `${s.intruders} of ${s.judged} leading singular directions of the tuned matrices have no counterpart among the base's `
        + `(score below ${r.epsilon}): ${s.rotated} of these lie mostly within the base's leading space (rotated), ${s.intruder} do not (intruder).`),
      el("ul", { class: "facts" },
        fact(s.audited, "matrices judged"), fact(s.intruder, "intruder"), fact(s.rotated, "rotated"),
        s.spikes ? fact(`${s.separated} / ${s.spikes}`, "spikes above threshold") : null,
        s.undecided ? fact(s.undecided, "undecided") : null,
        s.not_audited ? fact(s.not_audited, "not audited") : null,
        s.lost ? fact(s.lost, "updates not judged") : null));
    const steps = [];
    if (s.intruders > 0) {
      steps.push(["Take them out, keeping the rest: ", el("code", {}, `bulkedge repair ${r.base} ${r.tuned} -o repaired`)]);
      steps.push(["Train without them next time: ", el("code", {}, "bulkedge.tune.EdgeClip(model)"), ", or a smaller α; the map below shows where."]);
      const worst = [...r.matrices].filter((m) => m.worst !== null).sort((a, b) => a.worst - b.worst)[0];
      if (worst) steps.push(["Look at the worst first: ", el("button", { onclick: () => open(worst.name) }, worst.name)]);
    }
    if (s.undecided) steps.push(["Decide what is open: ", el("code", {}, `bulkedge audit ${r.base} ${r.tuned} --method dense`)]);
    if (s.lost || s.not_audited) steps.push("See what was not judged at the end of this page.");
    if (!steps.length) steps.push("Nothing to do.");
    fill("next", el("h3", {}, "What to do next"), el("ul", {}, steps.map((step) => el("li", {}, step))));
  }
  const fact = (value, what) => el("li", {}, el("b", {}, String(value)), el("span", { class: "faint" }, what));

  // ---- records side by side

  function comparison() {
    const section = document.getElementById("compare");
    section.hidden = data.records.length < 2;
    if (section.hidden) return;
    const heads = ["record", "matrices", "new", "rotated", "intruder", "worst score", "strongest ΔW/θ_c"];
    const rows = data.records.map((r, i) => {
      const worst = Math.min(...r.matrices.map((m) => m.worst ?? 1));
      const strongest = Math.max(...r.matrices.map((m) => m.over ?? 0));
      return el("tr", { "aria-selected": String(i === state.record), tabindex: "0", onclick: () => choose(i),
        onkeydown: (e) => { if (e.key === "Enter") choose(i); } },
        [r.label, r.summary.audited, r.summary.intruders, r.summary.rotated, r.summary.intruder, number(worst, 3), number(strongest)]
          .map((x) => el("td", {}, String(x))));
    });
    fill("compare-table", el("thead", {}, el("tr", {}, heads.map((h) => el("th", { scope: "col" }, h)))), el("tbody", {}, rows));
  }
  function choose(i) { state.record = i; state.open = null; draw(); }

  // ---- the map

  function place(name) {
    const plain = name.replace(/\.weight$/, "");
    const found = /^(.*?)\.(\d+)\.(.+)$/.exec(plain);
    if (!found) return { layer: "–", order: 1e9, kind: plain };
    return { layer: `${found[1]}.${found[2]}`, order: Number(found[2]), kind: found[3].replace(/\d+/g, "#") };
  }
  function map() {
    const cells = new Map(), kinds = [], layers = [];
    for (const m of record().matrices) {
      const { layer, kind } = place(m.name);
      if (!kinds.includes(kind)) kinds.push(kind);
      if (!layers.includes(layer)) layers.push(layer);
      const key = `${layer}\n${kind}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(m);
    }
    // lone matrices would each take a column of their own
    const inner = kinds.filter((kind) => layers.some((layer) => layer !== "–" && cells.has(`${layer}\n${kind}`)));
    const body = layers.filter((layer) => layer !== "–").map((layer) => el("tr", {}, el("th", { scope: "row" }, layer),
      inner.map((kind) => el("td", {}, cell(cells.get(`${layer}\n${kind}`))))));
    for (const kind of kinds.filter((kind) => cells.has(`–\n${kind}`))) {
      body.push(el("tr", {}, el("th", { scope: "row" }, kind), el("td", {}, cell(cells.get(`–\n${kind}`)))));
    }
    fill("map", el("thead", {}, el("tr", {}, el("td"), inner.map((kind) => el("th", { scope: "col" }, kind)))), el("tbody", {}, body));
  }
  function cell(found) {
    if (!found) return null;
    const worst = found.reduce((a, b) => strength(a) >= strength(b) ? a : b);
    const value = state.colour === "score" ? worst.worst : worst.over;
    const told = `${worst.name}: ${plural(worst.intruders, "new direction")}, worst score ${number(worst.worst, 3)}, ΔW/θ_c ${number(worst.over)}`
      + (found.length > 1 ? ` (worst of ${found.length})` : "");
    const button = el("button", { title: told, "aria-label": told, onclick: () => open(worst.name) }, value === null ? "–" : number(value));
    const share = Math.max(0, Math.min(1, strength(worst)));
    button.style.background = value === null ? "transparent" : `color-mix(in oklab, ${resolved("intruder")} ${Math.round(100 * share)}%, ${resolved("panel")})`;
    button.style.color = share > 0.55 ? resolved("paper") : resolved("ink");
    return button;
  }
  function strength(m) {
    if (state.colour === "score") return m.worst === null ? -1 : 1 - m.worst;
    return m.over === null ? -1 : m.over / (1 + m.over);
  }

  // ---- the table

  const COLUMNS = [
    ["name", "matrix", (m) => m.name, (m) => m.name],
    ["shape", "shape", (m) => m.shape[0] * m.shape[1], (m) => m.shape.join(" × ")],
    ["ratio", "ΔW/W₀", (m) => m.ratio, (m) => number(m.ratio)],
    ["over", "ΔW/θ_c", (m) => m.over, (m) => number(m.over)],
    ["rotated", "rotated", (m) => m.counts.rotated, (m) => m.counts.rotated],
    ["intruder", "intruder", (m) => m.counts.intruder, (m) => m.counts.intruder],
    ["undecided", "undecided", (m) => m.counts.undecided, (m) => m.counts.undecided],
    ["worst", "worst score", (m) => m.worst, (m) => number(m.worst, 3)],
  ];
  function table() {
    const others = data.records.map((r, i) => [r, i]).filter(([, i]) => i !== state.record);
    const columns = [...COLUMNS, ...others.map(([r, i]) => {
      const there = new Map(r.matrices.map((m) => [m.name, m]));
      return [`worst${i}`, `worst: ${r.label}`, (m) => there.get(m.name)?.worst ?? null, (m) => number(there.get(m.name)?.worst, 3)];
    })];
    const wanted = record().matrices.filter((m) => m.name.toLowerCase().includes(state.filter.toLowerCase())
      && (state.only === "all" || (state.only === "affected" ? m.intruders > 0 || m.status !== "audited" && m.status !== "unchanged"
        : m.counts[state.only] > 0)));
    const key = (columns.find((c) => c[0] === state.sort) ?? columns[0])[2];
    const natural = new Intl.Collator("en", { numeric: true });
    wanted.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return (state.down ? -1 : 1) * (typeof x === "string" ? natural.compare(x, y) : x - y);
    });
    const heads = columns.map(([id, label]) => el("th", { scope: "col",
      "aria-sort": state.sort === id ? (state.down ? "descending" : "ascending") : "none" },
      el("button", { onclick: () => { state.down = state.sort === id && !state.down; state.sort = id; table(); } },
        label, state.sort === id ? (state.down ? " ▾" : " ▴") : "")));
    const rows = wanted.map((m) => el("tr", { tabindex: "0", "data-name": m.name, "aria-selected": String(m.name === state.open),
      onclick: () => open(m.name), onkeydown: (e) => { if (e.key === "Enter") open(m.name); } },
      columns.map(([, , , show]) => el("td", {}, String(show(m))))));
    fill("matrices", el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows));
    fill("count", `${wanted.length} of ${record().matrices.length} matrices`);
  }

  // ---- one matrix

  function open(name) {
    state.open = name;
    table();
    const m = record().matrices.find((x) => x.name === name);
    const section = document.getElementById("details");
    section.hidden = false;
    const facts = [`${m.shape.join(" × ")}, ${m.dtype}`,
      m.rank === null ? "dense update" : `LoRA of rank ${m.rank}, scale ${number(m.scale)}`,
      m.passes ? `${m.passes} passes` : null, m.note].filter(Boolean).join(" · ");
    fill("detail-head", el("h2", { tabindex: "-1", id: "detail-name" }, name), el("p", { class: "faint" }, facts));
    const charts = document.getElementById("charts");
    charts.replaceChildren();
    for (const side of m.sides) {
      const directions = m.directions.filter((d) => d.side === side);
      const note = m.sides.length > 1 ? ` (${side})` : "";
      chart(`Scores of the leading directions${note}`, "The largest cosine with any base vector, with the interval that is proved; below the line a direction is new.", scores(directions));
      const similarity = m.similarity[side];
      if (similarity && similarity.length) chart(`Tuned against base vectors${note}`, "|cosine| of each tuned direction (rows) with the base's leading ones (columns).", heat(similarity));
    }
    if (m.spectrum) {
      chart("Singular values", "Of the base, all; of the tuned matrix, the leading ones. The dashed line is the edge of the base's bulk.", scree(m));
      chart("Their density", "Of the base; what stands beyond the dashed edge is no noise.", density(m));
    }
    if (m.predicted.length) {
      chart("Spikes of the update", "Strength over the threshold θ_c: a generic spike above 1 makes an outlier.", spikes(m));
      if (m.predicted.some((p) => p.location !== null)) chart("Expected and measured outliers", "If the spike's vectors knew nothing of the base.", outliers(m));
    }
    directionTable(m);
    document.getElementById("detail-name").focus({ preventScroll: true });
    section.scrollIntoView({ behavior: "auto", block: "start" });
  }
  function directionTable(m) {
    const heads = ["direction", "side", "σ", "score", "proved within", "overlap", "base vector", "verdict", "by"];
    fill("directions", el("thead", {}, el("tr", {}, heads.map((h) => el("th", { scope: "col" }, h)))),
      el("tbody", {}, m.directions.map((d) => el("tr", {}, [d.index, d.side, number(d.sigma, 3), number(d.score, 3),
        `${number(d.low, 3)} to ${number(d.high, 3)}`, number(d.overlap, 3), d.match < 0 ? "–" : d.match,
        el("span", { class: `tag ${d.verdict}` }, d.verdict), d.method].map((x) => el("td", {}, typeof x === "object" ? x : String(x)))))));
  }

  // ---- charts

  function chart(title, told, { traces, layout, label }) {
    const area = el("div", { role: "img", "aria-label": `${title}. ${label}` });
    document.getElementById("charts").append(el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, title), el("p", { class: "faint" }, told)), area));
    const ink = resolved("ink"), grid = resolved("line");
    const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid };
    const whole = { ...layout, margin: { l: 55, r: 15, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12 }, showlegend: layout.showlegend ?? false, legend: { orientation: "h", y: 1.12 },
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis } };
    Plotly.newPlot(area, traces, whole, CONFIG);
  }
  const line = (x0, x1, y0, y1) => ({ type: "line", x0, x1, y0, y1, line: { color: resolved("faint"), dash: "dash", width: 1.5 } });
  function scores(directions) {
    const x = directions.map((d) => d.index);
    return { label: directions.map((d) => `${d.index}: ${number(d.score)} ${d.verdict}`).join(", "),
      traces: [{ type: "scatter", mode: "markers", x, y: directions.map((d) => d.score),
        marker: { size: 9, color: directions.map((d) => resolved(d.verdict)) }, text: directions.map((d) => d.verdict),
        hovertemplate: "direction %{x}<br>score %{y:.3f}<br>%{text}<extra></extra>",
        error_y: { type: "data", symmetric: false, array: directions.map((d) => d.high - d.score), arrayminus: directions.map((d) => d.score - d.low), color: resolved("faint"), thickness: 1.5 } }],
      layout: { shapes: [{ ...line(0, 1, record().epsilon, record().epsilon), xref: "paper" }],
        xaxis: { title: { text: "direction, by singular value" }, dtick: 1 }, yaxis: { title: { text: "score" }, range: [0, 1.05] } } };
  }
  function heat(rows) {
    return { label: `${rows.length} by ${rows[0].length} cosines`,
      traces: [{ type: "heatmap", z: rows, zmin: 0, zmax: 1, colorscale: "Cividis", colorbar: { thickness: 10 }, hovertemplate: "tuned %{y}, base %{x}<br>%{z:.3f}<extra></extra>" }],
      layout: { xaxis: { title: { text: "base vector" } }, yaxis: { title: { text: "tuned direction" }, autorange: "reversed" } } };
  }
  function scree(m) {
    const tuned = m.directions.filter((d) => d.side === m.sides[0]);
    return { label: `edge ${m.edge === null ? "unknown" : number(m.edge, 3)}`,
      traces: [{ type: "scatter", mode: "lines", name: "base", x: m.spectrum.ranks.map((i) => i + 1), y: m.spectrum.values, line: { color: resolved("aligned") }, hovertemplate: "base %{x}: %{y:.4g}<extra></extra>" },
        { type: "scatter", mode: "markers", name: "tuned", x: tuned.map((d) => d.index + 1), y: tuned.map((d) => d.sigma), marker: { size: 8, symbol: "diamond", color: tuned.map((d) => resolved(d.verdict)) }, text: tuned.map((d) => d.verdict), hovertemplate: "tuned %{x}: %{y:.4g}<br>%{text}<extra></extra>" }],
      layout: { showlegend: true, shapes: m.edge === null ? [] : [{ ...line(0, 1, m.edge, m.edge), xref: "paper" }],
        xaxis: { type: "log", title: { text: "rank" } }, yaxis: { title: { text: "singular value" }, rangemode: "tozero" } } };
  }
  function density(m) {
    // the outline, read between its points, gives every value
    const { ranks, values } = m.spectrum, all = [];
    for (let j = 0, i = 0; i <= ranks[ranks.length - 1]; i++) {
      while (j + 1 < ranks.length && ranks[j + 1] <= i) j++;
      const k = Math.min(j + 1, ranks.length - 1), width = ranks[k] - ranks[j] || 1;
      all.push(values[j] + (values[k] - values[j]) * (i - ranks[j]) / width);
    }
    return { label: `${all.length} values`,
      traces: [{ type: "histogram", x: all, nbinsx: 60, histnorm: "probability density", marker: { color: resolved("aligned") }, hovertemplate: "%{x}: %{y:.3g}<extra></extra>" }],
      layout: { shapes: m.edge === null ? [] : [{ ...line(m.edge, m.edge, 0, 1), yref: "paper" }],
        xaxis: { title: { text: "singular value" } }, yaxis: { title: { text: "density" } } } };
  }
  function spikes(m) {
    const y = m.predicted.map((p) => p.theta / m.threshold);
    return { label: y.map((x) => number(x)).join(", "),
      traces: [{ type: "bar", x: y.map((_, i) => i), y, marker: { color: m.predicted.map((p) => resolved(p.separated ? "intruder" : "aligned")) }, hovertemplate: "spike %{x}: %{y:.2f} θ_c<extra></extra>" }],
      layout: { shapes: [{ ...line(0, 1, 1, 1), xref: "paper" }], xaxis: { title: { text: "spike" }, dtick: 1 }, yaxis: { title: { text: "θ / θ_c" } } } };
  }
  function outliers(m) {
    const found = m.predicted.filter((p) => p.location !== null);
    const measured = found.filter((p) => p.measured !== null);
    return { label: measured.map((p) => `${number(p.location)} expected, ${number(p.measured)} measured`).join("; "),
      traces: [{ type: "scatter", mode: "markers", name: "expected", x: found.map((p) => p.theta), y: found.map((p) => p.location), error_y: { type: "data", array: found.map((p) => 2 * (p.sd ?? 0)), color: resolved("faint") }, marker: { size: 9, symbol: "circle-open", color: resolved("ink") }, hovertemplate: "θ %{x:.3g}: expected %{y:.3g}<extra></extra>" },
        { type: "scatter", mode: "markers", name: "measured", x: measured.map((p) => p.theta), y: measured.map((p) => p.measured), marker: { size: 8, color: resolved("intruder") }, hovertemplate: "θ %{x:.3g}: measured %{y:.3g}<extra></extra>" }],
      layout: { showlegend: true, xaxis: { title: { text: "strength θ of the spike" } }, yaxis: { title: { text: "singular value of the tuned matrix" } } } };
  }

  // ---- what was not judged

  function rest() {
    const broken = record().matrices.filter((m) => m.status === "not_finite" || m.status === "failed");
    const rows = [...broken.map((m) => [m.name, m.note ?? m.status, true]), ...record().skipped];
    document.getElementById("rest").hidden = !rows.length;
    fill("skipped", rows.map(([name, why, lost]) => el("li", {}, lost ? el("b", {}, "not judged: ") : null, el("code", {}, name), ` ${why}`)));
  }

  function draw() {
    firstScreen(); comparison(); map(); table(); rest();
    document.getElementById("details").hidden = state.open === null;
    if (state.open !== null) open(state.open);
  }
  document.getElementById("filter").addEventListener("input", (e) => { state.filter = e.target.value; table(); });
  document.getElementById("only").addEventListener("change", (e) => { state.only = e.target.value; table(); });
  document.getElementById("colour").addEventListener("change", (e) => { state.colour = e.target.value; map(); });
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    draw();
  });
  if (!record().matrices.some((m) => m.intruders > 0)) { state.only = "all"; document.getElementById("only").value = "all"; }
  draw();
})();
