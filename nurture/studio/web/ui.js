// Elements without HTML strings: whatever text a model or a person wrote is set as text, never parsed.

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.startsWith("aria") && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function field(label, control) {
  return el("label", { class: "field" }, label, control);
}

/** A number with a slider; `value()` reads it, `oninput` is called when it changes. */
export function slider(label, { min, max, step, value, oninput }) {
  const shown = el("output", {}, String(value));
  const input = el("input", { type: "range", min, max, step, value });
  input.addEventListener("input", () => { shown.textContent = input.value; if (oninput) oninput(); });
  return { element: field(el("span", {}, `${label} `, shown), input), value: () => Number(input.value) };
}

export function pick(options, chosen, onchange, label) {
  return el("select", { onchange, "aria-label": label },
    options.map((option) => el("option", { value: option, selected: option === chosen }, option)));
}

export function announce(text) {
  document.getElementById("status").textContent = text;
}

export function complain(error) {
  if (error?.name === "AbortError") return;
  const box = document.getElementById("problem");
  const note = el("div", {}, el("span", {}, error.message || String(error)),
    el("button", { class: "quiet", type: "button", "aria-label": "Close this message", onclick: () => note.remove() }, "✕"));
  box.replaceChildren(note);
}

export function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export const percent = (share) => share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : share >= 0.001 ? `${(100 * share).toFixed(1)} %` : share > 0 ? "< 0.1 %" : "0 %";

/** Show a token so that spaces and line ends can be seen. */
export const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ /, "·").replace(/^$/, "∅");

/** Remember a setting in this browser; a browser that forbids it just forgets. */
export const memory = {
  get(key, fallback) { try { return JSON.parse(localStorage.getItem(`nurture.${key}`)) ?? fallback; } catch { return fallback; } },
  set(key, value) { try { localStorage.setItem(`nurture.${key}`, JSON.stringify(value)); } catch { /* forgotten */ } },
};
