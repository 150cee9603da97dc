// Elements are only ever built here: from tag names and text, never from markup.

export const $ = (id) => document.getElementById(id);

/** An element with properties, attributes (names with a dash, and role) and children (elements or text). */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Put text into the clipboard; outside of secure contexts (plain HTTP to another machine) the old way. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = el("textarea", { value: text, className: "unseen" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (!done) throw new Error("the browser does not allow it");
}

/** A button that copies what `text()` returns, and says so. */
export function copyButton(text, label = "Copy") {
  const button = el("button", { type: "button", className: "plain", textContent: label });
  button.addEventListener("click", async () => {
    let said = "Copied";
    try {
      await copy(text());
    } catch {
      said = "Not copied";
    }
    button.textContent = said;
    setTimeout(() => { button.textContent = label; }, 1600);
  });
  return button;
}
