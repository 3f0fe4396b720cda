// Elements made from values, never from markup: every text becomes a text node, so nothing that a model, a user or a
// worker says can become an element. Neighbours: every view.

/**
 * Return a new element. `attributes` are set as attributes, but for `text` (its only child) and `on` (listeners).
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Return the element of the page with an id. */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no #${id}`);
  return found;
}

/** Set an element's text if it differs, so that selections and screen readers are left in peace. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Show or hide an element. */
export function setShown(target, isShown) {
  target.hidden = !isShown;
}

/**
 * Make the children of `parent` those of `items`: kept by `keyOf`, made by `make(item)`, brought up to date by
 * `update(child, item)`. Children that stay are not touched, so focus stays where it is.
 */
export function keepInStep(parent, items, keyOf, make, update) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let child = before.get(key);
    if (child === undefined) {
      child = make(item);
      child.dataset.key = key;
    }
    before.delete(key);
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const gone of before.values()) gone.remove();
}

/** Return a button that acts on its second press within four seconds; `data-asking` is set between the two. */
export function carefulButton(text, question, act) {
  let timer = 0;
  const calm = () => {
    clearTimeout(timer);
    delete made.dataset.asking;
    setText(made, text);
  };
  const made = element("button", {
    type: "button",
    class: "small",
    text,
    on: {
      blur: calm,
      click: () => {
        if (made.dataset.asking === undefined) {
          made.dataset.asking = "";
          setText(made, question);
          timer = setTimeout(calm, 4000);
          return;
        }
        calm();
        act();
      },
    },
  });
  return made;
}
