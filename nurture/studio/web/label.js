// Rank answers, or write the right one: the rows a reward model and SFT are trained on.

import { get, post, runPath } from "/static/api.js";
import { announce, complain, el, field, memory, pick, slider } from "/static/ui.js";

export function makePage({ models, runs }) {
  const chat = models.filter((model) => !model.is_base).map((model) => model.id);
  if (!runs.length || !chat.length) {
    return { element: el("section", {}, el("h1", {}, "Label"), el("p", { class: "hint" }, "Labels are kept with a run and its models: serve a run that has a stage after SFT.")) };
  }
  let run = runs[0], answers = null; // {prompt, responses, places, model, id}
  let ideas = [], demonstrationId = newId();

  const labeler = el("input", { value: memory.get("labeler", "me"), maxLength: 60, autocomplete: "off", onchange: () => { memory.set("labeler", labeler.value); refresh(); } });
  const model = pick(chat, chat.at(-1), null, "Model");
  const temperature = slider("Temperature", { min: 0.1, max: 2, step: 0.05, value: 1.2 });
  const prompt = el("textarea", { rows: 2 });
  const ranked = el("div", { class: "stack" });
  const demonstration = el("textarea", { rows: 3, oninput: () => { saveDemo.disabled = !demonstration.value.trim(); } });
  const saveDemo = el("button", { type: "button", disabled: true, onclick: saveDemonstration }, "Save what I wrote");
  const known = el("div", { class: "small hint" });
  const get4 = el("button", { class: "main", type: "button", onclick: sample }, "Get answers");

  const element = el("section", { "aria-label": "Label", onkeydown: onKey },
    el("h1", {}, "Label"),
    el("div", { class: "card stack" },
      el("div", { class: "row" }, runs.length > 1 && field("Run", pick(runs, run, (event) => { run = event.target.value; refresh(); }, "Run")), field("You are", labeler), field("Answers by", model), el("div", { class: "grow" }, temperature.element)),
      field("Question", prompt),
      el("div", { class: "row" }, get4,
        el("button", { type: "button", onclick: suggest }, "Suggest a question"),
        el("button", { type: "button", onclick: takeOpen }, "Rank what others ranked"))),
    ranked,
    el("div", { class: "card stack" }, field("Or write what it should have said (a demonstration for SFT)", demonstration), el("div", { class: "row" }, saveDemo)),
    known);

  suggest();
  refresh();
  return { element };

  async function suggest() {
    try {
      if (!ideas.length) ideas = (await get(runPath(run, "prompts"))).prompts;
      prompt.value = ideas.splice(Math.floor(Math.random() * ideas.length), 1)[0];
    } catch (error) { complain(error); }
  }

  async function sample() {
    if (!prompt.value.trim()) return;
    get4.disabled = true;
    try {
      const messages = [{ role: "user", content: prompt.value.trim() }];
      const answer = await post("/v1/chat/completions", { model: model.value, messages, n: 12, temperature: temperature.value(), max_tokens: 300 });
      const different = [...new Set(answer.choices.map((choice) => choice.message.content))].slice(0, 4);
      if (different.length < 2) throw new Error("All answers are alike. Raise the temperature, or ask something else.");
      begin(messages, different, model.value);
    } catch (error) { complain(error); }
    get4.disabled = false;
  }

  async function takeOpen() {
    try {
      const { open } = await get(`${runPath(run, "labels")}?labeler=${encodeURIComponent(labeler.value)}`);
      if (!open) return announceBoth("Nobody else has ranked anything that you have not.");
      prompt.value = open.prompt.at(-1).content;
      begin(open.prompt, open.responses, open.model);
    } catch (error) { complain(error); }
  }

  function begin(messages, responses, by) {
    answers = { prompt: messages, responses, places: responses.map(() => null), model: by, id: newId() };
    draw();
    ranked.querySelector(".answer button")?.focus({ preventScroll: true });
    ranked.scrollIntoView({ block: "nearest" });
    announce(`${responses.length} answers to rank`);
  }

  function draw(after) {
    if (!answers) return ranked.replaceChildren();
    const places = answers.responses.map((_, place) => place);
    const focused = document.activeElement?.dataset?.place;
    const text = rankingText();
    ranked.replaceChildren(
      el("p", { class: "hint small" }, "Drag each letter to a place, 1 is best; two in one place are a tie. Keys 1 to 4 do it too, with an answer focused."),
      el("div", { class: "answers" }, answers.responses.map((answer, index) => el("div", { class: "card answer", role: "group", tabIndex: 0, "data-index": index, "aria-label": `Answer ${letter(index)}` },
        el("h2", {}, chip(index)), el("div", { class: "text" }, answer || "(nothing)"),
        el("div", { class: "places" }, answers.responses.map((_, place) => el("button", { type: "button", "data-place": `${index}.${place}`, "aria-label": `${letter(index)} in place ${place + 1}`, "aria-pressed": String(answers.places[index] === place), disabled: answers.saved, onclick: () => put(index, place) }, String(place + 1))),
          after?.rewards && el("span", { class: "pill" }, `reward ${after.rewards[index].toFixed(2)}`))))),
      el("ol", { class: "slots", "aria-label": "Places" }, places.map((place) => el("li", { "data-slot": place }, el("span", { class: "hint small" }, String(place + 1)),
        answers.places.flatMap((mine, index) => mine === place ? [chip(index)] : [])))),
      el("div", { class: "row" }, el("span", { class: "ranking", role: "status" }, text ?? "…"),
        !answers.saved && el("button", { class: "main", type: "button", disabled: !text, onclick: save }, "Save the ranking"),
        answers.saved && el("span", { class: "pill good" }, "saved"),
        answers.saved && el("button", { class: "main", type: "button", onclick: async () => { await suggest(); sample(); } }, "Next question")));
    if (focused) ranked.querySelector(`[data-place="${focused}"]`)?.focus();
  }

  /** A letter that can be dragged to a place, with a mouse, a pen or a finger; keys and buttons do the same. */
  function chip(index) {
    const element = el("span", { class: "chip", title: "Drag to a place" }, letter(index));
    if (answers.saved) return element;
    element.addEventListener("pointerdown", (down) => {
      if (down.button) return;
      down.preventDefault();
      element.setPointerCapture(down.pointerId);
      element.classList.add("dragged");
      let over = null;
      element.onpointermove = (move) => {
        element.style.transform = `translate(${move.clientX - down.clientX}px, ${move.clientY - down.clientY}px)`;
        over?.classList.remove("over");
        over = document.elementsFromPoint(move.clientX, move.clientY).map((one) => one.closest("[data-slot]")).find(Boolean) ?? null;
        over?.classList.add("over");
      };
      element.onpointerup = element.onpointercancel = (up) => {
        element.onpointermove = element.onpointerup = element.onpointercancel = null;
        if (over && up.type === "pointerup") answers.places[index] = Number(over.dataset.slot);
        draw();
      };
    });
    return element;
  }

  function put(index, place) {
    answers.places[index] = answers.places[index] === place ? null : place;
    draw();
  }

  function onKey(event) {
    const index = event.target.closest?.("[data-index]")?.dataset.index;
    if (index === undefined || !answers || answers.saved || !/^[1-9]$/.test(event.key) || Number(event.key) > answers.responses.length) return;
    event.preventDefault();
    const hadCard = event.target.dataset.index !== undefined;
    put(Number(index), Number(event.key) - 1);
    if (hadCard) ranked.querySelector(`[data-index="${index}"]`)?.focus();
  }

  /** "D > C > A = B", or null while an answer has no place. */
  function rankingText() {
    if (answers.places.includes(null)) return null;
    const used = [...new Set(answers.places)].sort();
    return used.map((place) => answers.places.flatMap((mine, index) => mine === place ? [letter(index)] : []).join(" = ")).join(" > ");
  }

  async function save() {
    try {
      const { prompt: asked, responses, model: by, id } = answers;
      const after = await post("/studio/labels/ranking", { run, id, labeler: labeler.value.trim() || "me", prompt: asked, responses, ranking: rankingText(), model: by });
      answers.saved = true;
      draw(after);
      drawKnown(after.summary);
      announce("Saved");
    } catch (error) { complain(error); }
  }

  async function saveDemonstration() {
    saveDemo.disabled = true;
    try {
      const after = await post("/studio/labels/demonstration", { run, id: demonstrationId, labeler: labeler.value.trim() || "me", prompt: [{ role: "user", content: prompt.value.trim() }], reply: demonstration.value });
      demonstration.value = "";
      demonstrationId = newId();
      drawKnown(after.summary);
      announce("Saved");
    } catch (error) { saveDemo.disabled = false; complain(error); }
  }

  async function refresh() {
    try { drawKnown((await get(runPath(run, "labels"))).summary); } catch (error) { complain(error); }
  }

  function drawKnown(summary) {
    const list = (counts) => Object.entries(counts).map(([name, count]) => `${name} ${count}`).join(", ") || "none";
    const agreed = summary.compared ? ` · labelers agree on ${Math.round(100 * summary.agreement.ordered)} % of ${summary.agreement.pairs} pairs that both ordered (InstructGPT's: 73 %)` : "";
    const model = summary.reward_model?.pairs ? ` · the reward model orders ${Math.round(100 * summary.reward_model.ordered)} % of ${summary.reward_model.pairs} pairs as the labelers did` : "";
    known.textContent = `Rankings: ${list(summary.rankings)} · demonstrations: ${list(summary.demonstrations)}${agreed}${model}. Kept in labels/ of the run.`;
  }

  function announceBoth(text) { announce(text); known.textContent = text; }
}

const letter = (index) => String.fromCharCode(65 + index);
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
