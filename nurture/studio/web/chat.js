// One question, several models side by side: the base model goes on, the aligned one answers.

import { stream } from "/static/api.js";
import { announce, complain, download, el, field, memory, slider } from "/static/ui.js";

const MOST_COLUMNS = 4;
const IDEAS = ["How do you feel today?", "What is the capital of France?", "The beaver lives in", "Write a function that adds two numbers.", "Tell me a story about a dog."];

export function makePage({ models }) {
  const byName = new Map(models.map((model) => [model.id, model]));
  const columns = startColumns(models).map((model) => ({ model }));
  const turns = []; // {asked, replies: Map(column -> reply), element}
  const running = new Set();

  const temperature = slider("Temperature", { min: 0, max: 2, step: 0.05, value: memory.get("temperature", 0.7) });
  const topP = slider("Top-p", { min: 0.05, max: 1, step: 0.05, value: memory.get("topP", 1) });
  const longest = el("input", { type: "number", min: 1, max: 100000, value: memory.get("longest", 200) });
  const seed = el("input", { type: "number", placeholder: "any", min: 0 });
  const system = el("input", { placeholder: "none", autocomplete: "off" });

  const heads = el("div", { class: "columns heads" });
  const talk = el("div", { class: "talk", role: "log", "aria-label": "Conversation", "aria-live": "off" });
  const question = el("textarea", { rows: 2, placeholder: "Ask all models, or begin a text…", "aria-label": "Your message", onkeydown: onKey });
  const send = el("button", { class: "main", type: "button", onclick: ask }, "Send");
  const stop = el("button", { type: "button", onclick: stopAll, hidden: true }, "Stop");

  const element = el("section", { "aria-label": "Chat" }, el("h1", { class: "hidden-text" }, "Chat"), heads, talk,
    el("div", { class: "composer stack" },
      el("div", { class: "row" }, el("div", { class: "grow" }, question), send, stop),
      el("div", { class: "row" },
        el("details", { class: "grow" }, el("summary", {}, "Sampling, system message, export"),
          el("div", { class: "controls" }, temperature.element, topP.element, field("Longest reply, tokens", longest), field("Seed", seed), field("System message", system)),
          el("div", { class: "row" }, el("button", { class: "quiet", type: "button", onclick: () => save("md") }, "Export Markdown"),
            el("button", { class: "quiet", type: "button", onclick: () => save("json") }, "Export JSON"))),
        el("button", { class: "quiet", type: "button", onclick: clear }, "New conversation"))));

  drawHeads();
  drawWelcome();
  return { element, onshow: () => question.focus({ preventScroll: true }) };

  function drawHeads() {
    element.style.setProperty("--columns", columns.length);
    heads.replaceChildren(...columns.map((column, number) => el("div", { class: "head" },
      el("select", { "aria-label": `Model of column ${number + 1}`, onchange: (event) => { column.model = event.target.value; drawHeads(); } },
        models.map((model) => el("option", { value: model.id, selected: model.id === column.model }, model.id))),
      el("span", { class: isBase(column) ? "pill base" : "pill good" }, isBase(column) ? "continues" : "answers"),
      columns.length > 1 && el("button", { class: "quiet", type: "button", "aria-label": `Remove column ${number + 1}`, onclick: () => { columns.splice(number, 1); drawHeads(); redraw(); } }, "✕"),
      number === columns.length - 1 && columns.length < MOST_COLUMNS &&
        el("button", { class: "quiet", type: "button", onclick: addColumn, "aria-label": "Add a column" }, "+"))));
  }

  function addColumn() {
    const unused = models.find((model) => !columns.some((column) => column.model === model.id)) ?? models[0];
    columns.push({ model: unused.id });
    drawHeads();
    redraw();
  }

  function isBase(column) {
    return byName.get(column.model)?.is_base;
  }

  function drawWelcome() {
    talk.replaceChildren(models.length
      ? el("div", { class: "welcome" },
          el("h2", {}, "The same words, before and after alignment"),
          el("p", { class: "hint" }, "A base model goes on with whatever you write. An aligned one answers it. Ask both:"),
          el("div", { class: "ideas" }, IDEAS.map((idea) => el("button", { type: "button", onclick: () => { question.value = idea; ask(); } }, idea))))
      : el("div", { class: "welcome" }, el("p", {}, "No stage has finished yet. The Watch page shows how far the run is.")));
  }

  function onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
    if (event.key === "Escape") stopAll();
  }

  function ask() {
    const asked = question.value.trim();
    if (!asked || running.size || !models.length) return;
    question.value = "";
    const turn = { asked, replies: new Map() };
    turns.push(turn);
    if (turns.length === 1) talk.replaceChildren();
    drawTurn(turn);
    talk.append(turn.element);
    for (const column of columns) reply(turn, column);
    turn.element.scrollIntoView({ block: "nearest" });
  }

  function drawTurn(turn) {
    const old = turn.element;
    turn.element = el("div", { class: "stack" },
      el("div", { class: "asked" }, el("div", { class: "text" }, turn.asked),
        el("div", { class: "tools" }, el("button", { class: "quiet", type: "button", onclick: () => edit(turn) }, "Edit"))),
      el("div", { class: "columns" }, columns.map((column) => drawReply(turn, column))));
    old?.replaceWith(turn.element);
  }

  function drawReply(turn, column) {
    const given = turn.replies.get(column);
    const card = el("article", { class: "card reply", "aria-label": `Reply of ${given?.model ?? column.model}` });
    if (!given) {
      card.append(el("button", { class: "quiet", type: "button", onclick: () => reply(turn, column) }, `Ask ${column.model}`));
      return card;
    }
    given.card = card;
    fill(turn, column, given);
    return card;
  }

  function fill(turn, column, given) {
    const body = el("div", { class: `text${given.running ? " writing" : ""}${given.base ? " long" : ""}`, tabIndex: given.base ? 0 : -1 });
    if (given.base) {
      body.append(el("span", { class: "prompt" }, turn.asked));
      given.text.split("<|endoftext|>").forEach((part, index) => {
        if (index) body.append(el("span", { class: "ends" }, "a new document begins"));
        body.append(el("span", { class: "written" }, part));
      });
    } else body.append(given.text);
    const thought = given.thought && el("details", { class: "thought", open: given.open, ontoggle: (event) => { given.open = event.target.open; } },
      el("summary", {}, given.running && !given.text ? "Thinking…" : "Thought"), el("div", { class: "text" }, given.thought));
    given.card.setAttribute("aria-busy", String(given.running));
    given.card.replaceChildren(
      el("div", { class: "from" }, el("span", {}, given.model), el("span", {}, given.base ? "goes on" : "")),
      ...[thought].filter(Boolean), body,
      el("div", { class: "tools" },
        !given.running && el("button", { class: "quiet", type: "button", onclick: () => reply(turn, column) }, "Regenerate"),
        !given.running && el("button", { class: "quiet", type: "button", onclick: () => navigator.clipboard?.writeText(given.text) }, "Copy"),
        el("span", { class: "facts" }, facts(given))));
  }

  function facts(given) {
    if (given.running) return "";
    const speed = given.seconds && given.tokens ? ` · ${Math.round(given.tokens / given.seconds)} tokens/s` : "";
    const why = { stop: "", length: " · stopped at the limit", stopped: " · stopped by you", error: " · failed" }[given.reason] ?? "";
    return `${given.tokens ? `${given.tokens} tokens` : ""}${speed}${why}`;
  }

  async function reply(turn, column) {
    for (const later of turns.slice(turns.indexOf(turn) + 1)) later.replies.delete(column);
    const given = { model: column.model, base: isBase(column), text: "", thought: "", running: true, open: false };
    turn.replies.set(column, given);
    redraw();
    const controller = new AbortController();
    running.add(controller);
    updateButtons();
    const started = performance.now();
    try {
      for await (const chunk of stream(...request(turn, column, given), controller.signal)) {
        const choice = chunk.choices[0];
        if (chunk.usage) given.tokens = chunk.usage.completion_tokens;
        given.text += choice?.delta?.content ?? choice?.text ?? "";
        given.thought += choice?.delta?.reasoning_content ?? "";
        given.reason = choice?.finish_reason ?? given.reason;
        soon(given, () => fill(turn, column, given));
      }
      announce(`${given.model} has answered`);
    } catch (error) {
      given.reason = error.name === "AbortError" ? "stopped" : "error";
      complain(error);
    }
    running.delete(controller);
    given.running = false;
    given.seconds = (performance.now() - started) / 1000;
    fill(turn, column, given);
    updateButtons();
  }

  function request(turn, column, given) {
    const body = { model: given.model, temperature: temperature.value(), top_p: topP.value(), max_tokens: Number(longest.value) || 200 };
    if (seed.value !== "") body.seed = Number(seed.value);
    memory.set("temperature", body.temperature);
    memory.set("topP", body.top_p);
    memory.set("longest", body.max_tokens);
    if (given.base) return ["/v1/completions", { ...body, prompt: turn.asked, ignore_eos: true }];
    const messages = system.value.trim() ? [{ role: "system", content: system.value.trim() }] : [];
    for (const earlier of turns.slice(0, turns.indexOf(turn))) {
      const said = earlier.replies.get(column);
      if (said && !said.base) messages.push({ role: "user", content: earlier.asked }, { role: "assistant", content: said.text });
    }
    return ["/v1/chat/completions", { ...body, messages: [...messages, { role: "user", content: turn.asked }] }];
  }

  function redraw() {
    turns.forEach(drawTurn);
  }

  function edit(turn) {
    stopAll();
    const from = turns.indexOf(turn);
    for (const gone of turns.splice(from)) gone.element.remove();
    question.value = turn.asked;
    question.focus();
    if (!turns.length) drawWelcome();
  }

  function clear() {
    stopAll();
    turns.splice(0);
    drawWelcome();
    question.focus();
  }

  function stopAll() {
    for (const controller of running) controller.abort();
  }

  function updateButtons() {
    stop.hidden = running.size === 0;
    send.hidden = running.size > 0;
  }

  function save(kind) {
    const plain = turns.map((turn) => ({ asked: turn.asked, replies: columns.filter((column) => turn.replies.has(column)).map((column) => {
      const { model, base, text, thought, reason } = turn.replies.get(column);
      return { model, base, text, ...(thought ? { thought } : {}), finish_reason: reason };
    }) }));
    if (kind === "json") return download("conversation.json", "application/json", JSON.stringify(plain, null, 2));
    const text = plain.map((turn) => `## ${turn.asked}\n\n${turn.replies.map((given) => `**${given.model}**${given.base ? " (continues)" : ""}\n\n${given.text}\n`).join("\n")}`).join("\n");
    return download("conversation.md", "text/markdown", text);
  }
}

/** The first base model beside the last aligned one, if there are both. */
function startColumns(models) {
  const base = models.find((model) => model.is_base);
  const aligned = models.filter((model) => !model.is_base).at(-1);
  return [base, aligned].filter(Boolean).map((model) => model.id);
}

/** Draw at most once a frame, however fast pieces come. */
const waiting = new Map();
let frame = 0;
function soon(what, draw) {
  waiting.set(what, draw);
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    const all = [...waiting.values()];
    waiting.clear();
    for (const one of all) one();
  });
}
