// Which page is shown. A page is made when it is first opened and kept, so that nothing is lost by looking elsewhere.

import { get } from "/static/api.js";
import { complain, el, memory } from "/static/ui.js";

const pages = ["chat", "tokens", "watch", "label", "play"];
const made = new Map();
let shared;

async function show() {
  const name = pages.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · nurture studio`;
  try {
    shared ??= await load();
    if (!made.has(name)) {
      const { makePage } = await import(`/static/${name}.js`);
      made.set(name, makePage(shared));
    }
  } catch (error) {
    shared = undefined;
    complain(error);
    document.getElementById("main").replaceChildren(el("p", { class: "hint" }, "The server cannot be reached."),
      el("button", { type: "button", onclick: show }, "Try again"));
    return;
  }
  for (const [other, page] of made) page.onhide?.(other === name);
  const page = made.get(name);
  document.getElementById("main").replaceChildren(page.element);
  page.onshow?.();
}

async function load() {
  const [models, runs] = await Promise.all([get("/v1/models"), get("/studio/runs")]);
  return { models: models.data, runs: runs.runs };
}

function theme(wanted) {
  document.documentElement.dataset.theme = wanted;
}

const system = matchMedia("(prefers-color-scheme: dark)");
theme(memory.get("theme", system.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => {
  const wanted = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  theme(wanted);
  memory.set("theme", wanted);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
addEventListener("hashchange", show);
show();
