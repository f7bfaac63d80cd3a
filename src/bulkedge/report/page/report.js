"use strict";
(() => {
  const { number, resolved } = charts;
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const several = data.records.length > 1;
  // the mild ones first, and then what counts as neither
  const counts = data.verdicts.filter(([, isCounted]) => isCounted).map(([name]) => name);
  const others = data.verdicts.filter(([, isCounted]) => !isCounted).map(([name]) => name);
  const state = { record: data.open, sort: "worst", down: false, filter: "", only: "affected", open: null, colour: "score" };
  let order = [];  // the names in the table, as they stand there

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
  const byId = (id) => document.getElementById(id);
  const fill = (id, ...children) => byId(id).replaceChildren(...children.flat().filter((x) => x !== null));
  const record = () => data.records[state.record];
  const counted = (n, one, many) => `${n} ${n === 1 ? one : many ?? `${one}s`}`;
  /** A name that breaks after its dots alone. */
  const broken = (name) => name.split(/(?<=\.)/).flatMap((part, i) => i ? [el("wbr"), part] : [part]);
  /** A drift, which may be of any order. */
  const brief = (x, digits = 3) => x === null || x === undefined ? "–" : String(Number(Number(x).toPrecision(digits)));
  /** A matrix by its module: the ending is the same in nearly every row. */
  const short = (name) => name.replace(/\.weight$/, "");
  const percent = (x) => brief(x === null ? null : 100 * x, 2);
  /** A score with as many digits as tell it from the limit. */
  const told = (score) => number(score, score !== null && Math.abs(score - record().epsilon) < 0.01 ? 3 : 2);

  // ---- the first screen

  function firstScreen() {
    const r = record(), s = r.summary;
    fill("verdict", several ? el("h2", { class: "of" }, r.label) : null,
      el("p", { class: `verdict ${r.kind}` }, r.headline),
      el("div", { class: "first" }, el("div", {},
      ...r.explanation.slice(0, -1).map((part) => el("p", {}, part)),
      r.explanation.length ? el("p", {}, r.explanation.at(-1), " ", el("a", { href: "#words" }, "What these words mean"), ", ", el("a", { href: "#severity" }, "how bad that is")) : null,
      el("ul", { class: "facts" },
        r.weaker ? fact(r.weaker[1], r.weaker[2]) : null,
        fact(s.audited, s.audited === 1 ? "matrix judged" : "matrices judged"), [...counts].reverse().map((name) => fact(s[name], name)),
        others.map((name) => s[name] ? fact(s[name], name) : null),
        s.not_audited ? fact(s.not_audited, "not audited") : null,
        s.lost ? fact(s.lost, s.lost === 1 ? "update not judged" : "updates not judged") : null)), howWeak(r)));
    const weak = document.querySelector("#verdict .chart > div");
    if (weak) charts.draw(weak, charts.scaled(r.curve, r.epsilon, r.weaker?.[0]));
    const worst = r.matrices.filter((m) => m.new_directions > 0).sort((a, b) => a.untrained - b.untrained || a.worst - b.worst)[0];
    fill("next", el("h3", {}, several ? `What to do next about ${r.label}` : "What to do next"),
      el("ol", {}, items(r.steps), worst ? el("li", { class: "screen" }, "See the worst of them: ", link(worst.name), r.copy.length ? " · " : "",
        r.copy.length ? el("details", { class: "inline" }, el("summary", {}, "Make the update weaker"), el("ol", {}, items(r.copy))) : null) : null),
      r.relative && r.steps.some(([, command]) => command?.startsWith("bulkedge")) ? el("p", { class: "faint" }, "Commands are for the folder in which the audit was run.") : null);
    fill("about", r.about);
  }
  /** The frame of the curve against the scale; nothing where there is one point alone. */
  function howWeak(r) {
    if (r.curve.expected.length + r.curve.judged.length < 2) return null;
    const { label } = charts.scaled(r.curve, r.epsilon, r.weaker?.[0]);
    return el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, "If the update is merged or served weaker"),
      el("p", { class: "faint" }, "Lines: as expected from how the update lies to the base. Dots: as judged. 1 is the update as it is.")),
      el("div", { role: "img", "aria-label": `New directions and lowest score against the scale. ${label}` }));
  }
  const items = (steps) => steps.map(([what, command]) => el("li", {}, what, command === null ? null : [" ", el("code", {}, command)]));
  const fact = (value, what) => el("li", {}, el("b", {}, String(value)), el("span", { class: "faint" }, what));
  const link = (name) => el("button", { type: "button", class: "link", onclick: () => go(name) }, broken(short(name)));

  // ---- records side by side

  function comparison() {
    byId("compare").hidden = !several;
    if (!several) return;
    const moved = data.records.some((r) => r.moments) ? ["mean drift"] : [];
    const heads = ["record", "matrices", "new", ...counts, "worst score", "strongest ΔW/θ_k", ...moved, ""];
    const rows = data.records.map((r, i) => {
      const worst = Math.min(...r.matrices.map((m) => m.worst ?? 1));
      const strongest = Math.max(...r.matrices.map((m) => m.over ?? 0));
      const shown = i === state.record;
      const cells = [r.label, r.summary.audited, r.summary.new_directions, ...counts.map((name) => r.summary[name]), number(worst, 3), number(strongest), ...moved.map(() => brief(r.drift))];
      return el("tr", { "aria-selected": String(shown) }, cells.map((x) => el("td", {}, String(x))),
        el("td", {}, el("button", { type: "button", disabled: shown, onclick: () => choose(i) }, shown ? "shown below" : "show")));
    });
    fill("mixed", data.mixed.map((line) => el("p", { class: "warning" }, line)));
    fill("compared", data.comparison);
    fill("compare-table", el("thead", {}, el("tr", {}, heads.map((h) => el("th", { scope: "col" }, h)))), el("tbody", {}, rows));
  }
  function choose(i) {
    state.record = i;
    if (!record().matrices.some((m) => m.name === state.open)) state.open = null;
    if (!wanted().length) show("all");
    remember(); draw();
  }
  function show(which) { state.only = which; byId("only").value = which; }

  // ---- the map

  function place(name) {
    const plain = name.replace(/\.weight$/, "");
    const found = /^(.*?)\.(\d+)\.(.+)$/.exec(plain);
    if (!found) return { layer: null, kind: plain };
    return { layer: `${found[1]}.${found[2]}`, kind: found[3].replace(/\d+/g, "#") };
  }
  function map() {
    const cells = new Map(), kinds = [], layers = [], lone = [];
    for (const m of record().matrices) {
      const { layer, kind } = place(m.name);
      if (layer === null) { lone.push([kind, m]); continue; }
      if (!kinds.includes(kind)) kinds.push(kind);
      if (!layers.includes(layer)) layers.push(layer);
      const key = `${layer}\n${kind}`;
      cells.set(key, [...(cells.get(key) ?? []), m]);
    }
    const rows = layers.map((layer) => el("tr", {}, el("th", { scope: "row" }, broken(layer)),
      kinds.map((kind) => el("td", {}, cell(cells.get(`${layer}\n${kind}`))))));
    // a matrix that is in no layer stands alone, in no column
    rows.push(...lone.map(([kind, m]) => el("tr", {}, el("th", { scope: "row" }, broken(kind)),
      el("td", { colspan: Math.max(kinds.length, 1), class: "lone" }, cell([m])))));
    fill("map", el("thead", {}, el("tr", {}, el("td"), kinds.map((kind) => el("th", { scope: "col" }, kind)))), el("tbody", {}, rows));
    const [from, to] = state.colour === "score" ? [`≥ ${record().epsilon}: in the base`, "0: wholly new"]
      : state.colour === "drift" ? [`≤ ${percent(mostDrift() / DRIFTS)} %`, `${percent(mostDrift())} %: the most here`] : ["≤ 1: below its limit θ_k", "far above"];
    fill("legend", swatch(0), ` ${from} `, [0.01, 0.33, 0.66, 1].map(swatch), ` ${to}`);
  }
  const channels = (color) => color.match(/[\d.]+/g).slice(0, 3).map(Number);
  function paint(node, share) {
    const from = channels(resolved("panel")), to = channels(resolved("intruder"));
    const part = share > 0 ? 0.3 + 0.7 * share : 0;
    const mixed = from.map((x, i) => x + part * (to[i] - x));
    // the sRGB luminance, and whichever of black and white stands out more
    const [r, g, b] = mixed.map((x) => x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4);
    const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    node.style.background = `rgb(${mixed.map(Math.round).join(" ")})`;
    node.style.color = 1.05 / (light + 0.05) > (light + 0.05) / 0.05 ? "#fff" : "#000";
    return node;
  }
  const swatch = (share) => paint(el("i", { class: "swatch" }), share);
  function cell(found) {
    if (!found) return null;
    const worst = found.reduce((a, b) => badness(a) >= badness(b) ? a : b);
    const value = state.colour === "score" ? told(worst.worst) : state.colour === "drift" ? percent(worst.drift) : number(worst.over);
    const what = `${worst.name}: ${counted(worst.new_directions, "new direction")}, worst score ${number(worst.worst, 3)}, ΔW/θ_k ${number(worst.over)}`
      + (record().moments ? `, drift ${brief(worst.drift)}` : "") + (found.length > 1 ? ` (the worst of ${found.length})` : "");
    const button = el("button", { type: "button", title: what, "aria-label": what, class: worst.new_directions ? "found" : null, onclick: () => go(worst.name) }, value);
    return badness(worst) === null ? button : paint(button, badness(worst));
  }
  /** From 0, nothing to see, to 1; null where it is not known. */
  function badness(m) {
    if (state.colour === "score") return m.worst === null ? null : Math.max(0, 1 - m.worst / record().epsilon);
    if (state.colour === "drift") {  // on a logarithmic scale: one matrix may have most of it
      return m.drift === null ? null : Math.max(0, 1 + Math.log(m.drift / mostDrift() || 0) / Math.log(DRIFTS));
    }
    return m.over === null ? null : Math.max(0, 1 - 1 / Math.max(m.over, 1e-9));
  }

  const DRIFTS = 1000;  // from the palest to the reddest
  const mostDrift = () => Math.max(0, ...record().matrices.map((m) => m.drift ?? 0));

  // ---- the table

  // id, head, the key that it is sorted by, what is shown, whether the first click sorts down, class
  const NAME = ["name", "matrix", (m) => m.name, (m) => [link(m.name), m.untrained ? el("span", { class: "tag", title: "Noise by the law of Marchenko and Pastur: everything is new in a matrix that was never pretrained." }, "base looks untrained") : null], false];
  const COLUMNS = data.columns.map((c) => [c.id, c.heading, (m) => m.cells[c.id][0], (m) => m.cells[c.id][1], !c.lowFirst, c.wide ? "wide" : undefined]);
  const isIdle = (c) => (c.ifAny && !record().matrices.some((m) => m.cells[c.id][0])) || (c.ofMoments && !record().moments);
  function columns() {
    const own = COLUMNS.filter((_, i) => !isIdle(data.columns[i]));
    return [NAME, ...own, ...data.records.flatMap((r, i) => {
      if (i === state.record) return [];
      const there = new Map(r.matrices.map((m) => [m.name, m]));
      return [[`new${i}`, `new: ${r.label}`, (m) => there.get(m.name)?.new_directions ?? null, (m) => there.get(m.name)?.new_directions ?? "–", true],
        [`worst${i}`, `worst: ${r.label}`, (m) => there.get(m.name)?.worst ?? null, (m) => number(there.get(m.name)?.worst, 3), false]];
    })];
  }
  function wanted() {
    const sought = state.filter.toLowerCase();
    return record().matrices.filter((m) => m.name.toLowerCase().includes(sought)
      && (state.only === "all" || (state.only === "affected" ? m.new_directions > 0 || m.status === "not_finite" || m.status === "failed"
        : m.counts[state.only] > 0)));
  }
  function table() {
    const shown = columns(), rows = wanted(), natural = new Intl.Collator("en", { numeric: true });
    const key = (shown.find(([id]) => id === state.sort) ?? shown[0])[2];
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === null || y === null) return (x === null) - (y === null);
      return (state.down ? -1 : 1) * (typeof x === "string" ? natural.compare(x, y) : x - y);
    });
    order = rows.map((m) => m.name);
    const heads = shown.map(([id, label, , , first, kind]) => el("th", { scope: "col", class: kind,
      "aria-sort": state.sort === id ? (state.down ? "descending" : "ascending") : "none" },
      el("button", { type: "button", onclick: () => { state.down = state.sort === id ? !state.down : first; state.sort = id; table(); } },
        label, state.sort === id ? (state.down ? " ▾" : " ▴") : "")));
    const body = rows.map((m) => el("tr", { "data-name": m.name, "aria-selected": String(m.name === state.open),
      onclick: (e) => { if (!e.target.closest("button")) go(m.name); } },
      shown.map(([, , , what, , kind]) => { const x = what(m); return el("td", { class: kind }, typeof x === "object" ? x : String(x)); })));
    fill("matrices", el("thead", {}, el("tr", {}, heads)), el("tbody", {}, body));
    fill("count", rows.length ? `${rows.length} of ${counted(record().matrices.length, "matrix", "matrices")}`
      : "None is so: choose another name, or show all.");
  }

  // ---- one matrix

  /** Open a matrix, under an address that can be kept. */
  function go(name) { state.open = name; remember(); details(true); }
  function remember() {
    const place = new URLSearchParams();
    if (several) place.set("record", state.record);
    if (state.open !== null) place.set("matrix", state.open);
    history.replaceState(null, "", `#${place}`);
  }
  function recall() {
    const place = new URLSearchParams(location.hash.slice(1)), record_ = place.get("record");
    if (record_ !== null && Number(record_) in data.records) state.record = Number(record_);
    state.open = record().matrices.some((m) => m.name === place.get("matrix")) ? place.get("matrix") : null;
  }
  function details(moved) {
    table();
    const m = record().matrices.find((x) => x.name === state.open);
    byId("details").hidden = m === undefined;
    if (m === undefined) return;
    const facts = [`${m.shape.join(" × ")}, ${m.dtype}`,
      m.rank === null ? "dense update" : `LoRA of rank ${m.rank}, scale ${number(m.scale)}`, ranks(m),
      m.passes ? `${m.passes} passes over the matrix` : null, m.untrained ? "the base looks untrained" : null,
      m.drift === null ? null : `drift ${brief(m.drift)}`, m.driftNote === null ? null : `drift not measured: ${m.driftNote}`, m.note].filter(Boolean).join(" · ");
    const at = order.indexOf(m.name);
    const step = (label, i) => el("button", { type: "button", disabled: at < 0 || !(i in order), onclick: () => go(order[i]) }, label);
    fill("detail-head", el("div", { class: "tools" }, step("‹ previous", at - 1), step("next ›", at + 1),
      el("button", { type: "button", onclick: () => { state.open = null; remember(); details(false); byId("matrices").scrollIntoView(); } }, "close")),
      el("h2", { tabindex: "-1", id: "detail-name" }, broken(short(m.name))), el("p", { class: "faint" }, facts));
    byId("charts").replaceChildren();
    for (const [title, what, chart] of charts.of(m, record().epsilon)) {
      const area = el("div", { role: "img", "aria-label": `${title}. ${chart.label}` });
      byId("charts").append(el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, title), el("p", { class: "faint" }, what)), area));
      charts.draw(area, chart);
    }
    directionTable(m);
    if (!moved) return;
    byId("detail-name").focus({ preventScroll: true });
    byId("details").scrollIntoView({ behavior: "auto", block: "start" });
  }
  function ranks(m) {
    const [all, used, effective, stable] = m.ranks;
    return all ? `rank in use ${used} of ${all}, effective ${number(effective, 1)}, stable ${number(stable, 1)}` : null;
  }
  function directionTable(m) {
    const moved = m.drift && m.directions.some((d) => d.along !== null) ? ["part of the drift"] : [];
    const heads = ["direction", "side", "σ", "score", "proved", "nearest in base", "within its leading space", ...moved, "verdict"];
    const wide = new Set([1, 4, 5]);  // a phone has no room for side, proof and neighbour
    const cell = (tag, more) => (x, i) => el(tag, { ...more, class: wide.has(i) ? "wide" : undefined }, typeof x === "object" ? x : String(x));
    const proved = (d) => d.high - d.low < 5e-4 ? (d.method === "dense" ? "exact, by SVDs" : "to 3 digits")
      : `${number(d.low, 3)} to ${number(d.high, 3)}`;
    fill("directions", el("thead", {}, el("tr", {}, heads.map(cell("th", { scope: "col" })))),
      el("tbody", {}, m.directions.map((d) => el("tr", {}, [d.index, d.side, number(d.sigma, 3), number(d.score, 3), proved(d),
        d.match < 0 ? "–" : d.match, `${number(100 * d.overlap ** 2, 1)} %`,
        ...moved.map(() => d.along === null ? "–" : `${Math.round(100 * d.along / m.drift)} %`),
        el("span", { class: `tag ${d.verdict}` }, d.verdict)].map(cell("td", {}))))));
  }

  // ---- what was not judged

  function rest() {
    const failed = record().matrices.filter((m) => m.status === "not_finite" || m.status === "failed");
    const rows = [...failed.map((m) => [m.name, m.note ?? m.status, true]), ...record().skipped];
    byId("rest").hidden = !rows.length;
    fill("skipped", rows.map(([name, why, lost]) => el("li", {}, lost ? el("b", {}, "not judged: ") : null, el("code", {}, name), ` ${why}`)));
  }

  function draw() { comparison(); firstScreen(); map(); details(false); rest(); }
  byId("filter").addEventListener("input", (e) => { state.filter = e.target.value; table(); });
  byId("only").addEventListener("change", (e) => { state.only = e.target.value; table(); });
  byId("colour").addEventListener("change", (e) => { state.colour = e.target.value; map(); });
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    draw();
  });
  addEventListener("hashchange", () => {
    if (["#words", "#severity"].includes(location.hash)) { byId("words").open = true; byId(location.hash.slice(1)).scrollIntoView(); return; }
    recall(); draw();
  });
  // paper is white, and narrower than most windows
  let before = null;
  addEventListener("beforeprint", () => {
    before = [root.dataset.theme, byId("words").open];
    root.dataset.theme = "light"; byId("words").open = true; draw();
    for (const area of document.querySelectorAll(".chart > div")) Plotly.relayout(area, { autosize: false, width: 320, height: 260 });
  });
  addEventListener("afterprint", () => {
    if (before[0] === undefined) delete root.dataset.theme; else root.dataset.theme = before[0];
    byId("words").open = before[1]; draw();
  });
  if (!data.records.some((r) => r.moments)) byId("colour").querySelector("[value=drift]").remove();
  recall();
  if (!record().matrices.some((m) => m.new_directions > 0)) show("all");
  draw();
  if (state.open !== null) details(true);
})();
