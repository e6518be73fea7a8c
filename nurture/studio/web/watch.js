// A run while it runs: its stages, curves that grow, samples, and the report card.

import { get, post, runPath } from "/static/api.js";
import { announce, complain, el, pick } from "/static/ui.js";

const EVERY = 2000;
const STATUS = { fresh: ["done", "good"], new: ["not yet", ""], unfinished: ["interrupted", "warn"], stale: ["done, changed since", ""], damaged: ["damaged", "warn"] };
const RATES = new Set("facts arithmetic translation cloze format stopped share pair_accuracy pair_ceiling tie_accuracy gold_win_rate harm over_refusal think_obeyed no_think_obeyed math math_think math_no_think code code_exact wordle_win wordle_solver wordle_random passkey multikey variables passkey_yarn multikey_yarn variables_yarn".split(" "));

export function makePage({ runs }) {
  if (!runs.length) {
    return { element: el("section", {}, el("h1", {}, "Watch"), el("p", { class: "hint" }, "No run is served. Start the studio with a run: nurture serve runs/tiny")) };
  }
  let run = runs[0], stage = null, timer = 0, map = null, reportFor = "";
  let rows = [], next = 0;

  const title = el("h1", {}, "");
  const state = el("span", { class: "pill", role: "status" });
  const steer = el("button", { type: "button", hidden: true, onclick: steerRun });
  let asked = 0; // when the run was told to stop
  const stages = el("ol", { class: "stages", "aria-label": "Stages" });
  const note = el("p", { class: "hint small" });
  const charts = el("div", { class: "charts" });
  const samples = el("div", { class: "samples" });
  const report = el("div", { class: "stack" });
  const element = el("section", { "aria-label": "Watch" },
    el("div", { class: "row" }, title, state, steer, runs.length > 1 && pick(runs, run, (event) => { run = event.target.value; stage = null; reset(); tick(); }, "Run")),
    stages, note,
    el("div", { class: "card stack" }, el("h2", {}, "Curves"), charts),
    el("div", { class: "card stack" }, el("h2", {}, "Report"), report),
    el("details", { class: "card" }, el("summary", {}, "Samples"), samples));

  return { element, onshow: tick, onhide: (shown) => { if (!shown) clearTimeout(timer); } };

  function reset() { rows = []; next = 0; charts.replaceChildren(); samples.replaceChildren(); }

  async function tick() {
    clearTimeout(timer);
    try {
      map = await get(runPath(run));
      if (!stage) stage = (map.stages.find((one) => one.running) ?? map.stages.filter((one) => one.has_metrics).at(-1))?.name ?? null;
      drawMap();
      await Promise.all([loadMetrics(), loadReport()]);
    } catch (error) { complain(error); }
    if (element.isConnected) timer = setTimeout(tick, map?.running ? EVERY : 4 * EVERY);
  }

  function drawMap() {
    title.textContent = `Run ${map.run}`;
    state.textContent = map.running ? "running" : "not running";
    state.className = map.running ? "pill good" : "pill";
    const waited = performance.now() - asked;
    if (!map.running) asked = 0;
    steer.hidden = !map.can_stop && !map.can_resume;
    steer.textContent = map.can_resume ? "Resume" : !asked ? "Stop" : waited > 8000 ? "Stop at once" : "Stopping…";
    steer.disabled = Boolean(asked) && waited <= 8000;
    const focused = document.activeElement?.dataset?.stage;
    stages.replaceChildren(...map.stages.map((one) => {
      const [word, look] = one.running ? ["running", "good"] : STATUS[one.status] ?? [one.status, "warn"];
      return el("li", {}, el("button", { type: "button", "data-stage": one.name, "aria-pressed": String(one.name === stage), title: one.reason || one.name, onclick: () => choose(one.name) },
        el("b", {}, one.name), el("span", { class: "small hint" }, [one.seconds && clock(one.seconds), one.tokens && `${big(one.tokens)} tokens`].filter(Boolean).join(", ") || one.kind),
        el("span", {}, el("span", { class: `pill ${look}` }, word))));
    }));
    if (focused) stages.querySelector(`[data-stage="${CSS.escape(focused)}"]`)?.focus();
    const about = map.stages.find((one) => one.name === stage);
    note.textContent = map.problem ?? [about?.from?.length && `starts from ${about.from.join(", ")}`, about?.reason && (about.status === "stale" ? `would run again: ${about.reason}` : about.reason)].filter(Boolean).join(" · ");
  }

  async function steerRun() {
    try {
      await post(runPath(run, map.can_resume ? "resume" : "stop"), map.can_resume ? {} : { at_once: asked > 0 });
      asked = map.can_resume ? 0 : performance.now();
      announce(map.can_resume ? "The run goes on" : "The run was told to stop");
      await tick();
    } catch (error) { complain(error); }
  }

  function choose(name) { stage = name; reset(); drawMap(); loadMetrics().catch(complain); }

  async function loadMetrics() {
    if (!stage) return charts.replaceChildren(el("p", { class: "hint" }, "Nothing has been trained yet."));
    const wanted = stage;
    for (;;) {
      const part = await get(`${runPath(run, "stages", wanted, "metrics")}?after=${next}`).catch(() => ({ rows: [], next: 0 }));
      if (wanted !== stage) return;
      if (part.restarted) rows = [];
      const grown = part.next > next;
      rows.push(...part.rows);
      next = part.next;
      if (!grown) break;
    }
    drawCharts();
    if (map.stages.find((one) => one.name === wanted)?.has_samples) drawSamples((await get(runPath(run, "stages", wanted, "samples"))).samples);
  }

  function drawCharts() {
    const groups = new Map(); // chart -> line -> points
    for (const row of rows) {
      for (const [name, value] of Object.entries(row)) {
        if (name === "step" || typeof value !== "number") continue;
        const [chart, line] = grouped(name);
        if (!groups.has(chart)) groups.set(chart, new Map());
        const lines = groups.get(chart);
        if (!lines.has(line)) lines.set(line, []);
        lines.get(line).push([row.step, value]);
      }
    }
    const order = [...groups].filter(([, lines]) => [...lines.values()].some((points) => new Set(points.map((point) => point[1])).size > 1)).sort(([a], [b]) => weight(a) - weight(b));
    charts.replaceChildren(...(order.length ? order.map(([name, lines]) => chart(name, lines)) : [el("p", { class: "hint" }, "This stage has left no curves.")]));
  }

  function drawSamples(all) {
    samples.replaceChildren(...all.slice(-60).map((one) => el("div", { class: "card small stack" },
      ...Object.entries(one).map(([name, value]) => el("div", {}, el("span", { class: "hint" }, `${name} `), el("span", { class: "text" }, typeof value === "string" ? value : JSON.stringify(value)))))));
  }

  async function loadReport() {
    const done = map.stages.map((one) => `${one.name}${one.status}${one.seconds}`).join();
    if (done === reportFor) return;
    const { stages: finished } = await get(runPath(run, "report"));
    reportFor = done;
    const measured = finished.filter((one) => Object.keys(one.metrics ?? {}).length);
    report.replaceChildren(...(measured.length ? measured.map(stageReport) : [el("p", { class: "hint" }, "No stage has been measured yet.")]));
  }
}

function stageReport(stage, place) {
  return el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": `Report of ${stage.name}, ${place + 1}` }, el("h3", {}, stage.name),
    el("table", { class: "small" }, el("thead", {}, el("tr", {}, ["measure", "before", "after", "95 % interval", "n"].map((name, place) => el("th", { class: place ? "number" : null }, name)))),
      el("tbody", {}, Object.entries(stage.metrics).map(([name, value]) => {
        const measure = typeof value === "object" ? value : { after: value };
        const show = (number) => number === undefined || number === null ? "" : RATES.has(name.split("/")[0]) ? `${(100 * number).toFixed(1)} %` : Number(number.toFixed?.(3) ?? number).toLocaleString("en");
        return el("tr", {}, el("td", {}, name), el("td", { class: "number" }, show(measure.before)), el("td", { class: "number" }, el("b", {}, show(measure.after))),
          el("td", { class: "number" }, measure.low === undefined ? "" : `${show(measure.low)} – ${show(measure.high)}`), el("td", { class: "number" }, measure.n?.toLocaleString("en") ?? ""));
      }))));
}

/** train/bpb/web and eval/bpb/web are lines of one chart each; train/loss is a chart of its own. */
function grouped(name) {
  const parts = name.split("/");
  return parts.length > 2 ? [parts.slice(0, -1).join("/"), parts.at(-1)] : ["tokens", "epoch", "share"].includes(parts[0]) ? [parts[0], parts.slice(1).join("/")] : [name, name];
}

function weight(name) {
  const first = ["train/loss", "rl/reward_mean", "rl/kl", "eval", "rl", "train/bpb", "train"];
  const place = first.findIndex((start) => name.startsWith(start));
  return place < 0 ? first.length : place;
}

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function chart(name, lines) {
  const width = 340, height = 190, left = 56, right = 8, top = 8, bottom = 22;
  const all = [...lines.values()].flat();
  let [low, high] = extent(all.map((point) => point[1]));
  const [first, last] = extent(all.map((point) => point[0]));
  if (low === high) { low -= 1; high += 1; }
  const x = (step) => left + (width - left - right) * (last === first ? 0.5 : (step - first) / (last - first));
  const y = (value) => height - bottom - (height - top - bottom) * (value - low) / (high - low);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name}: ${[...lines].map(([line, points]) => `${line} from ${short(points[0][1])} to ${short(points.at(-1)[1])}`).join(", ")}` });
  for (const value of [low, (low + high) / 2, high]) {
    drawing.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    drawing.append(svg("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  drawing.append(svg("text", { x: left, y: height - 6 }, short(first)), svg("text", { x: width - right, y: height - 6, "text-anchor": "end" }, `step ${short(last)}`));
  [...lines].forEach(([, points], index) => {
    const path = thin(points).map(([step, value], place) => `${place ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const line = svg("path", { d: path, "stroke-dasharray": ["", "6 3", "2 3"][Math.floor(index / 8) % 3] });
    line.style.stroke = `var(--c${index % 8})`;
    drawing.append(line);
  });
  const legend = lines.size > 1 && el("div", { class: "legend" }, [...lines.keys()].map((line, index) => {
    const mark = el("i");
    mark.style.background = `var(--c${index % 8})`;
    return el("span", {}, mark, line);
  }));
  return el("div", { class: "chart stack" }, el("h3", {}, name), drawing, legend);
}

const extent = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

/** At most some hundred points: of each stretch the lowest and the highest, so that no spike is lost. */
function thin(points) {
  const most = 200;
  if (points.length <= 2 * most) return points;
  const kept = [];
  for (let part = 0; part < most; part++) {
    const stretch = points.slice(Math.floor(part * points.length / most), Math.floor((part + 1) * points.length / most));
    const sorted = [...stretch].sort((a, b) => a[1] - b[1]);
    kept.push(...[sorted[0], sorted.at(-1)].sort((a, b) => a[0] - b[0]));
  }
  return kept;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toPrecision(3)}B`;
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${(value / 1e3).toPrecision(3)}k`;
  return Number(value.toPrecision(3)).toString();
}

const big = (value) => short(value);
const clock = (seconds) => seconds < 60 ? `${Math.round(seconds)} s` : seconds < 3600 ? `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s` : `${Math.floor(seconds / 3600)} h ${Math.round(seconds % 3600 / 60)} min`;
