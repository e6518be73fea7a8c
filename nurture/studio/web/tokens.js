// A text as the model sees it: how surprised it was at each token, and what it would have said instead.

import { post } from "/static/api.js";
import { announce, complain, el, field, percent, pick, slider, visible } from "/static/ui.js";

const SHOWN = 20;

export function makePage({ models }) {
  const byName = new Map(models.map((model) => [model.id, model]));
  let tokens = []; // {token, text, logprob, entropy}
  let chosen = null; // the place looked at; tokens.length is the place after the last
  let seen = null; // the distribution there
  let asked = 0;

  const model = pick(models.map((one) => one.id), models.at(-1)?.id, () => { drawMode(); analyse(); }, "Model");
  const question = el("input", { value: "Where does the beaver live?", autocomplete: "off" });
  const questionField = field("Question (leave empty for plain text)", question);
  const text = el("textarea", { rows: 3 });
  const textField = field("Text", text);
  const temperature = slider("Temperature", { min: 0, max: 2, step: 0.05, value: 1, oninput: refresh });
  const topK = slider("Top-k (0: all)", { min: 0, max: 100, step: 1, value: 0, oninput: refresh });
  const topP = slider("Top-p", { min: 0.05, max: 1, step: 0.01, value: 0.9, oninput: refresh });
  const minP = slider("Min-p", { min: 0, max: 0.5, step: 0.01, value: 0, oninput: refresh });

  const strip = el("div", { class: "tokens", role: "group", "aria-label": "Tokens; arrow keys move between them", onkeydown: onKey });
  const panel = el("div", { class: "card sticky stack" });
  const facts = el("p", { class: "hint small" });

  const element = el("section", { "aria-label": "Tokens" },
    el("h1", {}, "Tokens"),
    el("div", { class: "card stack" },
      el("div", { class: "row" }, field("Model", model), el("div", { class: "grow" }, questionField)),
      textField,
      el("div", { class: "row" },
        el("button", { class: "main", type: "button", onclick: analyse }, "Take it apart"),
        el("button", { type: "button", onclick: () => step("likeliest") }, "Add the likeliest token"),
        el("button", { type: "button", onclick: () => step("draw") }, "Draw a token"),
        el("button", { type: "button", onclick: undo }, "Undo"))),
    el("div", { class: "split" },
      el("div", { class: "card stack" }, facts, strip),
      panel));

  drawMode();
  if (models.length) analyse();
  return { element };

  function drawMode() {
    const base = byName.get(model.value)?.is_base;
    questionField.hidden = base;
    textField.firstChild.textContent = base ? "Text" : "Reply so far";
    if (!text.value && base) text.value = "The beaver lives in the";
  }

  function plainQuestion() {
    return byName.get(model.value)?.is_base || !question.value.trim() ? null : question.value.trim();
  }

  async function analyse() {
    try {
      const body = { model: model.value, text: text.value };
      if (plainQuestion()) body.question = plainQuestion();
      tokens = (await post("/studio/tokens", body)).tokens;
      await look(tokens.length);
      announce(`${tokens.length} tokens`);
    } catch (error) { complain(error); }
  }

  function draw() {
    strip.replaceChildren(...tokens.map((one, place) => {
      const special = /^<\|.*\|>$/.test(one.text);
      const button = el("button", { type: "button", class: special ? "special" : null, "aria-pressed": String(place === chosen), tabIndex: place === chosen ? 0 : -1,
        "aria-label": `${visible(one.text)}${one.logprob === null ? "" : `, ${percent(Math.exp(one.logprob))}`}`,
        title: one.logprob === null ? "the first token" : `${percent(Math.exp(one.logprob))}, entropy ${one.entropy.toFixed(2)} nats`, onclick: () => look(place) },
        one.text.includes("\n") ? one.text.replaceAll("\n", "↵\n") : one.text);
      button.style.setProperty("--surprise", one.logprob === null ? 0 : Math.min(0.75, -one.logprob / 10));
      return button;
    }), el("button", { type: "button", class: "next", "aria-pressed": String(chosen === tokens.length), tabIndex: chosen === tokens.length ? 0 : -1, onclick: () => look(tokens.length) }, "next"));
    const scored = tokens.filter((one) => one.logprob !== null);
    const nats = scored.reduce((sum, one) => sum - one.logprob, 0);
    facts.textContent = scored.length ? `${tokens.length} tokens, ${(nats / scored.length).toFixed(2)} nats a token on average. The warmer, the more surprising; click one.` : "";
  }

  async function look(place) {
    chosen = place;
    draw();
    await refresh();
  }

  async function refresh() {
    if (chosen === null) return;
    if (chosen === 0) {
      panel.replaceChildren(el("p", { class: "hint" }, "Before the first token there is nothing to predict it from."));
      return;
    }
    const number = ++asked;
    try {
      const answer = await post("/studio/tokens/next", { model: model.value, token_ids: tokens.slice(0, chosen).map((one) => one.token), temperature: temperature.value(), top_k: topK.value(), top_p: topP.value(), min_p: minP.value(), count: 200 });
      if (number !== asked) return; // a later question is under way
      seen = answer;
      drawPanel();
    } catch (error) { complain(error); }
  }

  function drawPanel() {
    const own = tokens[chosen];
    let rows = seen.candidates.slice(0, SHOWN);
    const ownRow = own && seen.candidates.find((one) => one.token === own.token);
    if (ownRow && !rows.includes(ownRow)) rows = [...rows.slice(0, -1), ownRow];
    const scale = Math.max(...rows.map((one) => Math.max(one.sampled, one.probability)));
    const focused = panel.contains(document.activeElement) && document.activeElement.type === "range" ? document.activeElement : null;
    panel.replaceChildren(
      el("h2", {}, own ? `Instead of “${visible(own.text)}”` : "What comes next"),
      el("div", { class: "facts-row small" },
        el("span", {}, "entropy ", el("b", {}, `${seen.entropy.toFixed(2)} nats`)),
        el("span", {}, "as open as ", el("b", {}, `${seen.effective.toFixed(1)} tokens`)),
        el("span", {}, "sampling keeps ", el("b", {}, `${seen.kept} of ${seen.vocabulary}`)),
        el("span", {}, "their share ", el("b", {}, percent(seen.kept_mass)))),
      el("div", { class: "controls" }, temperature.element, topP.element, topK.element, minP.element),
      el("table", { class: "candidates" },
        el("thead", {}, el("tr", {}, el("th", {}, "token"), el("th", { class: "number" }, "model"), el("th", { class: "number" }, "sampled"), el("th", {}, el("span", { class: "hidden-text" }, "bars")))),
        el("tbody", {}, rows.map((one) => candidate(one, own, scale)))),
      el("p", { class: "hint small" }, "Grey bar: the model itself. Coloured: after temperature and cuts. Click a token to go on from it."));
    focused?.focus();
  }

  function candidate(one, own, scale) {
    const bars = [el("div", { class: "bar model" }), el("div", { class: "bar" })];
    bars[0].style.width = `${100 * one.probability / scale}%`;
    bars[1].style.width = `${100 * one.sampled / scale}%`;
    return el("tr", { class: [one.cut && "cut", own?.token === one.token && "own"].filter(Boolean).join(" ") },
      el("td", {}, el("button", { type: "button", "aria-label": `Go on with ${visible(one.text)}`, onclick: () => take(one) }, visible(one.text))),
      el("td", { class: "number" }, percent(one.probability)),
      el("td", { class: "number" }, one.cut ? `cut: ${one.cut}` : percent(one.sampled)),
      el("td", { width: "35%" }, one.cut ? bars[0] : bars));
  }

  function take(one) {
    tokens = [...tokens.slice(0, chosen), { token: one.token, text: one.text, logprob: Math.log(one.probability), entropy: seen.entropy }];
    look(tokens.length);
  }

  async function step(how) {
    if (chosen !== tokens.length) await look(tokens.length);
    if (!seen) return;
    if (how === "likeliest") return take(seen.candidates[0]);
    const open = seen.candidates.filter((one) => one.sampled > 0);
    let left = Math.random() * open.reduce((sum, one) => sum + one.sampled, 0);
    take(open.find((one) => (left -= one.sampled) <= 0) ?? open[0]);
  }

  function undo() {
    if (tokens.length > 1) { tokens = tokens.slice(0, -1); look(tokens.length); }
  }

  function onKey(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const place = Math.min(Math.max(chosen + move, 0), tokens.length);
    look(place);
    strip.children[place].focus();
  }
}
