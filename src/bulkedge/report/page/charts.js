"use strict";
// The charts of one matrix: what plotly is asked to draw.  Nothing here knows of the page around it.
const charts = (() => {
  const root = document.documentElement;
  const CONFIG = { displaylogo: false, showSendToCloud: false, responsive: true, displayModeBar: false };
  const TICKS = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000];
  const number = (x, digits = 2) => x === null || x === undefined ? "–" : Number(x).toFixed(digits);
  const resolved = (name) => {  // light-dark() as the one that holds now
    const probe = document.createElement("span");
    probe.style.color = `var(--${name})`;
    root.append(probe);
    const value = getComputedStyle(probe).color;
    probe.remove();
    return value;
  };
  const dashed = (x0, x1, y0, y1) => ({ type: "line", x0, x1, y0, y1,
    line: { color: resolved("faint"), dash: "dash", width: 1.5 } });
  const across = (y) => ({ ...dashed(0, 1, y, y), xref: "paper" });
  const dotted = (y) => { const line = across(y); line.line.dash = "dot"; return line; };

  /** Draw one into an element. */
  function draw(area, { traces, layout }) {
    const grid = resolved("line"), axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid };
    const whole = { ...layout, margin: { l: 55, r: 15, t: 32, b: 45 },
      ...(layout.yaxis2 ? { yaxis2: { ...axis, ...layout.yaxis2 } } : {}),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: resolved("ink"), size: 12 },
      showlegend: layout.showlegend ?? false, legend: { orientation: "h", x: 0, y: 1.16 },
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis } };
    Plotly.newPlot(area, traces, whole, CONFIG);
  }

  function scores(directions, epsilon) {
    const ends = { type: "data", symmetric: false, color: resolved("faint"), thickness: 1.5,
      array: directions.map((d) => d.high - d.score),
      arrayminus: directions.map((d) => d.score - d.low) };
    return { label: directions.map((d) => `${d.index}: ${number(d.score)} ${d.verdict}`).join(", "),
      traces: [{ type: "scatter", mode: "markers", x: directions.map((d) => d.index),
        y: directions.map((d) => d.score), error_y: ends, text: directions.map((d) => d.verdict),
        marker: { size: 9, color: directions.map((d) => resolved(d.verdict)) },
        hovertemplate: "direction %{x}<br>score %{y:.3f}<br>%{text}<extra></extra>" }],
      layout: { shapes: [across(epsilon)],
        xaxis: { title: { text: "tuned direction, by singular value" }, dtick: 1 },
        yaxis: { title: { text: "score" }, range: [0, 1.05] } } };
  }

  function heat(rows) {
    return { label: `${rows.length} by ${rows[0].length} cosines`,
      traces: [{ type: "heatmap", z: rows, zmin: 0, zmax: 1, colorscale: "Cividis",
        colorbar: { thickness: 10 },
        hovertemplate: "tuned %{y}, base %{x}<br>|cosine| %{z:.3f}<extra></extra>" }],
      layout: { xaxis: { title: { text: "base direction" } },
        yaxis: { title: { text: "tuned direction" }, autorange: "reversed" } } };
  }

  function scree(m) {
    const tuned = m.directions.filter((d) => d.side === m.sides[0]);
    // a logarithmic axis has no 0: places are one more than the ranks that the ticks tell
    const base = { type: "scatter", mode: "lines", name: "base", x: m.spectrum.ranks.map((i) => i + 1),
      y: m.spectrum.values, customdata: m.spectrum.ranks, line: { color: resolved("aligned") },
      hovertemplate: "base %{customdata}: %{y:.4g}<extra></extra>" };
    const found = { type: "scatter", mode: "markers", name: "tuned", x: tuned.map((d) => d.index + 1),
      y: tuned.map((d) => d.sigma), customdata: tuned.map((d) => d.index),
      text: tuned.map((d) => d.verdict),
      marker: { size: 8, symbol: "diamond", color: tuned.map((d) => resolved(d.verdict)) },
      hovertemplate: "tuned %{customdata}: %{y:.4g}<br>%{text}<extra></extra>" };
    return { label: `edge ${number(m.edge, 3)}`, traces: [base, found],
      layout: { showlegend: true, shapes: m.edge === null ? [] : [across(m.edge)],
        xaxis: { type: "log", title: { text: "direction, by singular value" },
          tickvals: TICKS.map((i) => i + 1), ticktext: TICKS.map(String) },
        yaxis: { title: { text: "singular value" }, rangemode: "tozero" } } };
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
      traces: [{ type: "histogram", x: all, nbinsx: 60, histnorm: "probability density",
        marker: { color: resolved("aligned") }, hovertemplate: "%{x}: %{y:.3g}<extra></extra>" }],
      layout: { shapes: m.edge === null ? [] : [{ ...dashed(m.edge, m.edge, 0, 1), yref: "paper" }],
        xaxis: { title: { text: "singular value of the base" } }, yaxis: { title: { text: "density" } } } };
  }

  function spikes(m) {
    const y = m.predicted.map((p) => p.theta / m.top_k_threshold);
    return { label: y.map((x) => number(x)).join(", "),
      traces: [{ type: "bar", x: y.map((_, i) => i), y,
        marker: { color: m.predicted.map((p) => resolved(p.theta > m.top_k_threshold ? "intruder" : "aligned")) },
        hovertemplate: "spike %{x}: %{y:.2f} θ_k<extra></extra>" }],
      layout: { shapes: [across(1), dotted(m.threshold / m.top_k_threshold)], xaxis: { title: { text: "spike, by strength" }, ...(y.length < 8 ? { tickvals: y.map((_, i) => i), range: [-0.6, 7.6] } : { dtick: 1 }) },
        yaxis: { title: { text: "strength θ / θ_k" } } } };
  }

  const SCALES = [0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10];
  /** New directions above, the lowest score below, against the scale of the update. */
  function scaled(curve, epsilon, weaker) {
    const place = ([scale]) => Math.log10(scale), all = [...curve.expected, ...curve.judged];
    const trace = (points, i, y, look) => ({ x: points.map(place), y: points.map((p) => p[i]), yaxis: y, type: "scatter",
      customdata: points.map((p) => p[0]), hovertemplate: i === 1 ? "at %{customdata:.3g}: %{y:.3g} new<extra></extra>" : "at %{customdata:.3g}: score %{y:.3g}<extra></extra>", ...look });
    const line = { mode: "lines", name: "expected", line: { color: resolved("aligned"), width: 2 } };
    const dots = { mode: curve.judged.length > 1 ? "lines+markers" : "markers", name: "judged",
      line: { color: resolved("intruder"), width: 1 }, marker: { size: 7, color: resolved("intruder") } };
    const mark = (scale, dash) => ({ type: "line", x0: Math.log10(scale), x1: Math.log10(scale), y0: 0, y1: 1, yref: "paper",
      line: { color: resolved("faint"), dash, width: 1.5 } });
    const marks = [mark(1, "dash"), { ...across(epsilon), yref: "y2" }];
    if (weaker) marks.push(mark(weaker, "dot"));
    const far = Math.max(1, ...curve.judged.map((p) => p[0])), near = Math.min(...all.map((p) => p[0]));
    const told = curve.judged.map(([scale, fresh, score]) => `at ${Number(scale.toPrecision(2))} ${Number(fresh.toPrecision(2))} new, lowest ${number(score)}`);
    return { label: (told.length > 12 ? told.filter((_, i) => i % 4 === 0) : told).join("; "),
      traces: [trace(curve.expected, 1, "y", line), trace(curve.judged, 1, "y", dots),
        trace(curve.expected, 2, "y2", { ...line, showlegend: false }), trace(curve.judged, 2, "y2", { ...dots, showlegend: false })],
      layout: { showlegend: curve.expected.length > 0, shapes: marks,
        xaxis: { title: { text: "scale of the update" }, anchor: "y2", range: [Math.log10(near) - 0.03, Math.log10(Math.max(2, far)) + 0.03],
          tickvals: SCALES.map((s) => Math.log10(s)), ticktext: SCALES.map(String), zeroline: false },
        yaxis: { title: { text: "new" }, domain: [0.5, 1], rangemode: "tozero" },
        yaxis2: { title: { text: "lowest score" }, domain: [0, 0.42], range: [0, 1.05] } } };
  }

  function outliers(m) {
    const found = m.predicted.filter((p) => p.location !== null);
    const measured = found.filter((p) => p.measured !== null);
    return { label: measured.map((p) => `${number(p.location)} expected, ${number(p.measured)} measured`).join("; "),
      traces: [{ type: "scatter", mode: "markers", name: "expected", x: found.map((p) => p.theta),
        y: found.map((p) => p.location), marker: { size: 9, symbol: "circle-open", color: resolved("ink") },
        error_y: { type: "data", array: found.map((p) => 2 * (p.sd ?? 0)), color: resolved("faint") },
        hovertemplate: "θ %{x:.3g}: expected %{y:.3g}<extra></extra>" },
      { type: "scatter", mode: "markers", name: "measured", x: measured.map((p) => p.theta),
        y: measured.map((p) => p.measured), marker: { size: 8, color: resolved("intruder") },
        hovertemplate: "θ %{x:.3g}: measured %{y:.3g}<extra></extra>" }],
      layout: { showlegend: true, xaxis: { title: { text: "strength θ of the spike" } },
        yaxis: { title: { text: "singular value, tuned" } } } };
  }

  function carriers(m) {
    const rest = m.drift - m.driftParts.reduce((sum, [, part]) => sum + part, 0);
    const bars = m.driftParts.map(([i, part]) => [String(i), part / m.drift]);
    if (rest > 1e-3 * m.drift) bars.push(["others", rest / m.drift]);
    return { label: bars.map(([name, part]) => `${name}: ${Math.round(100 * part)} %`).join(", "),
      traces: [{ type: "bar", x: bars.map(([name]) => name), y: bars.map(([, part]) => part),
        marker: { color: resolved("intruder") }, hovertemplate: "direction %{x}: %{y:.1%}<extra></extra>" }],
      layout: { xaxis: { type: "category", title: { text: "direction of the update, by singular value" } },
        yaxis: { title: { text: "part of the drift" }, tickformat: ".0%", rangemode: "tozero" } } };
  }

  /** The charts of a matrix: title, what it shows, and how. */
  function of(m, epsilon) {
    const shown = [];
    for (const side of m.sides) {
      const directions = m.directions.filter((d) => d.side === side), similarity = m.similarity[side];
      const note = m.sides.length > 1 ? ` (${side})` : "";
      shown.push([`Scores of the leading directions${note}`,
        "The largest cosine of each with any direction of the base, and the interval that is proved. Below the dashed line it counts as new.",
        scores(directions, epsilon)]);
      if (similarity?.length) shown.push([`Tuned against base directions${note}`,
        "|cosine| of each tuned direction (rows) with the base's leading ones (columns). A dark row is new, a smeared diagonal has turned.",
        heat(similarity)]);
    }
    if (m.spectrum) {
      shown.push(["Singular values", "Of the base, all; of the tuned matrix, the leading ones. The dashed line is the edge of the base's bulk, beyond which a value is not noise.", scree(m)]);
      shown.push(["Density of the base's singular values", "The hill is the bulk. A value beyond the dashed edge is not noise.", density(m)]);
    }
    if (m.predicted.length && m.top_k_threshold) {
      shown.push(["Spikes of the update", "Their strength over the limit θ_k, dashed. Above it an update that is unrelated to the base makes a new direction among the leading ones; above the dotted threshold θ_c, somewhere. A hint, not a finding.", spikes(m)]);
      if (m.predicted.some((p) => p.location !== null)) shown.push(["Where spikes should and do stand out",
        "Circles: where a spike of that strength would stand if it were unrelated to the base, ± two standard deviations. Dots: where it stands. Where they differ, the update leans on the base's own directions.", outliers(m)]);
    }
    if (m.curve && m.curve.expected.length + m.curve.judged.length > 1) shown.push(["If the update is scaled",
      "New directions, and the lowest score, against the factor on the update. Line: as expected from how it lies to the base. Dots: as judged. 1, dashed, is the update as it is.", scaled(m.curve, epsilon)]);
    if (m.drift && m.driftParts.length) shown.push(["What carries the drift",
      "The part of the drift in each singular direction of the update, those with the most first. They need not be its strongest ones: what counts is how much of the inputs lies along them.", carriers(m)]);
    return shown;
  }
  return { draw, of, scaled, number, resolved };
})();
