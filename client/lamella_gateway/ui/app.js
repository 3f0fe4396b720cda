// The page: who looks at it, which view is shown, and when it asks again.

import { ApiError, ask, key } from "./api.js";
import { Chat } from "./chat.js";
import { byId, setShown, setText } from "./dom.js";
import { Fleet } from "./fleet.js";
import { Jobs } from "./jobs.js";

const EVERY_MS = 2000;
const HIDDEN_EVERY_MS = 10000; // while another tab is looked at
const VIEWS = ["chat", "jobs", "workers"];
const THEMES = { auto: "◐ Auto", light: "○ Light", dark: "● Dark" };
const THEME = "lamella-theme";

const chat = new Chat(signOut);
const jobs = new Jobs();
const fleet = new Fleet();
let account = null;
let timer = 0;

/** Find out who looks, with the key there is; without a valid one ask for it. */
async function enter() {
  try {
    account = await ask("lamella/account");
  } catch (error) {
    showSignIn(error);
    return;
  }
  setShown(byId("sign-in"), false);
  setShown(document.querySelector("nav"), true);
  setShown(byId("sign-out"), account.key !== null);
  setShown(byId("account-name"), account.key !== null);
  setText(byId("account-name"), account.is_admin ? `${account.user}, admin` : (account.user ?? ""));
  setShown(document.querySelector('[data-view="jobs"]'), account.sees_jobs);
  jobs.open(account);
  fleet.open(account);
  showView();
  await chat.open(account).catch(tell);
  tick();
}

function showSignIn(error) {
  account = null;
  clearTimeout(timer);
  setShown(document.querySelector("nav"), false);
  for (const id of [...VIEWS, "sign-out", "account-name"]) setShown(byId(id), false);
  const needsKey = error instanceof ApiError && error.status === 401;
  setShown(byId("sign-in"), needsKey);
  const hadKey = needsKey && key.get() !== null;
  setShown(byId("sign-in-error"), hadKey);
  if (hadKey) setText(byId("sign-in-error"), "This API key is not valid: it is wrong, or it was revoked.");
  if (needsKey) {
    key.forget();
    tell(null);
    byId("key").focus();
    return;
  }
  tell(error);
  timer = setTimeout(enter, EVERY_MS); // the gateway may come back
}

function signOut(error = null) {
  chat.clear();
  if (error === null) key.forget();
  showSignIn(error ?? new ApiError(401, ""));
}

function view() {
  const asked = location.hash.slice(1);
  return VIEWS.includes(asked) && (asked !== "jobs" || account.sees_jobs) ? asked : "chat";
}

function showView() {
  if (account === null) return;
  const shown = view();
  for (const name of VIEWS) setShown(byId(name), name === shown);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${shown[0].toUpperCase()}${shown.slice(1)} · Lamella`;
  if (shown === "chat" && matchMedia("(pointer: fine)").matches) byId("prompt").focus();
}

/** Ask what the view shows, and again after a while; one request at a time. */
async function tick() {
  clearTimeout(timer);
  const who = account;
  if (who === null) return;
  try {
    const shown = view();
    if (who.is_admin || shown === "workers") await fleet.refresh(shown === "workers" && !document.hidden);
    if (shown === "jobs" && !document.hidden) await jobs.refresh();
    if (shown === "chat" && !document.hidden) await chat.loadModels();
    if (who === account) tell(null);
  } catch (error) {
    if (who !== account) return;
    if (error instanceof ApiError && error.status === 401) {
      signOut(error);
      return;
    }
    tell(error);
  }
  if (who === account) {
    clearTimeout(timer);
    timer = setTimeout(tick, document.hidden ? HIDDEN_EVERY_MS : EVERY_MS);
  }
}

/** Say what is wrong, or that nothing is. */
function tell(error) {
  setText(byId("trouble"), error === null ? "" : `${error.message} Trying again.`);
  setShown(byId("trouble"), error !== null);
}

function showTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(byId("theme"), THEMES[theme]);
  byId("theme").setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}`);
}

function theme() {
  const kept = localStorage.getItem(THEME);
  return kept in THEMES ? kept : "auto";
}

byId("theme").addEventListener("click", () => {
  const all = Object.keys(THEMES);
  localStorage.setItem(THEME, all[(all.indexOf(theme()) + 1) % all.length]);
  showTheme(theme());
});
byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("key").value.trim();
  if (!/^[!-~]+$/.test(given)) {
    setText(byId("sign-in-error"), "This is no API key: it has other characters than letters, digits and dashes.");
    setShown(byId("sign-in-error"), true);
    return;
  }
  key.set(given);
  byId("key").value = "";
  enter();
});
byId("sign-out").addEventListener("click", () => signOut());
window.addEventListener("hashchange", () => {
  showView();
  tick();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) tick();
});

showTheme(theme());
enter();
