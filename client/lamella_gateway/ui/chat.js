// The chat: a dialogue that is kept in the page, one answer at a time, streamed, and stopped by leaving its stream.

import { ApiError, ask, stream } from "./api.js";
import { byId, element, setShown, setText } from "./dom.js";
import { counted, figure, span } from "./format.js";
import { markdown } from "./markdown.js";

const ASK_AFTER_MS = 2000; // so long nothing may come before the queue is asked why
const MOST_RENDERING = 0.2; // share of the time that drawing a long answer may take

export class Chat {
  /** `onExpired` is called when the key no longer counts. */
  constructor(onExpired) {
    this.onExpired = onExpired;
    this.account = null;
    this.turns = []; // what the model reads: {role, content}
    this.answering = null; // AbortController of the answer under way
    this.models = byId("model");
    this.log = byId("messages");
    this.prompt = byId("prompt");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.prompt.addEventListener("input", () => this.fitPrompt());
    byId("chat").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    byId("chat-settings").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !event.currentTarget.open) return;
      event.stopPropagation(); // closes the settings and stops nothing
      event.currentTarget.open = false;
      event.currentTarget.querySelector("summary").focus();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.clear());
    this.clear();
  }

  /** Begin with an account; what another one said is gone. */
  async open(account) {
    this.account = account;
    await this.loadModels();
  }

  /** Forget everything, and leave the answer under way. */
  clear() {
    this.stop();
    this.turns = [];
    this.log.replaceChildren(
      element("p", { class: "empty", text: "Ask something. Tokens appear as they are computed." }),
    );
  }

  stop() {
    this.answering?.abort();
  }

  /** Fill the list of models, keeping the choice. */
  async loadModels() {
    const { data } = await ask("v1/models");
    const chosen = this.models.value;
    const names = data.map((model) => model.id);
    const shown = [...this.models.options].map((option) => option.value);
    if (names.length > 0 && names.join() === shown.join()) return;
    this.models.replaceChildren(
      ...(names.length > 0
        ? names.map((name) => element("option", { value: name, text: name, selected: name === chosen }))
        : [element("option", { value: "", text: "no model is served now" })]),
    );
  }

  fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight + 2, window.innerHeight * 0.4)}px`;
  }

  async send() {
    const text = this.prompt.value.trim();
    if (text === "" || this.answering !== null) return;
    this.prompt.value = "";
    this.fitPrompt();
    if (this.turns.length === 0) this.log.replaceChildren();
    if (this.turns.at(-1)?.role === "user") this.turns.pop(); // it was not answered, and templates want turns in turn
    this.turns.push({ role: "user", content: text });
    this.log.append(message("You", element("div", { class: "said plain", text })));
    await this.answer();
    this.prompt.focus({ preventScroll: true });
  }

  /** Ask for the answer to the last turn, and show it while it grows. */
  async answer() {
    for (const offer of this.log.querySelectorAll(".again")) offer.remove(); // what came before stays as it is
    const answer = new Answer(this.log, this.models.value || "Model");
    this.answering = new AbortController();
    const { signal } = this.answering;
    this.showAnswering(true);
    const waiting = setInterval(() => this.tellWaiting(answer), ASK_AFTER_MS);
    try {
      if (this.models.value === "") await this.loadModels();
      for await (const chunk of stream("v1/chat/completions", this.request(), signal)) answer.take(chunk);
      answer.end();
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else this.failed(answer, error);
    } finally {
      clearInterval(waiting);
      this.answering = null;
      this.showAnswering(false);
    }
    if (answer.text !== "" && this.turns.length > 0) this.turns.push({ role: "assistant", content: answer.text });
  }

  /** Return what is asked of the gateway; settings that are empty are the model's or the gateway's to choose. */
  request() {
    const system = byId("system").value.trim();
    const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
    return {
      model: this.models.value,
      messages: [...(system === "" ? [] : [{ role: "system", content: system }]), ...this.turns],
      stream: true,
      stream_options: { include_usage: true },
      temperature: number("temperature"),
      top_p: number("top-p"),
      max_completion_tokens: number("most-tokens"),
      seed: number("seed"),
    };
  }

  failed(answer, error) {
    if (error instanceof ApiError && error.status === 401) this.onExpired(error);
    const again = element("button", {
      type: "button",
      class: "small again",
      text: "Try again",
      on: {
        click: () => {
          if (this.answering !== null) return;
          answer.remove();
          if (this.turns.at(-1)?.role === "assistant") this.turns.pop();
          this.answer();
        },
      },
    });
    answer.fail(error.message, again);
  }

  /** Say why nothing comes: where the job stands in its queue. */
  async tellWaiting(answer) {
    if (answer.text !== "" || answer.jobId === null || !this.account?.sees_jobs) return;
    const job = await ask(`lamella/jobs/${encodeURIComponent(answer.jobId)}`).catch(() => null); // only a hint
    if (job !== null) answer.tellWaiting(job);
  }

  showAnswering(isOn) {
    setShown(byId("send"), !isOn);
    setShown(byId("stop"), isOn);
    this.log.setAttribute("aria-busy", String(isOn));
  }
}

/** One answer of the model while it grows. */
class Answer {
  constructor(log, model) {
    this.log = log;
    this.text = "";
    this.jobId = null;
    this.reason = null;
    this.usage = null;
    this.pieces = 0;
    this.began = performance.now();
    this.firstAt = null;
    this.drawing = 0; // the timer of the next drawing
    this.said = element("div", { class: "said" });
    this.note = element("p", { class: "note", text: "waiting" });
    this.shown = message(model, this.said, this.note);
    this.shown.classList.add("growing");
    log.append(this.shown);
    this.toEnd();
    this.clock = setInterval(() => this.tellTime(), 500);
  }

  /** Take a chunk of the stream. */
  take(chunk) {
    if (this.jobId === null && chunk.id?.startsWith("chatcmpl-")) this.jobId = chunk.id.slice("chatcmpl-".length);
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices[0];
    if (choice === undefined) return;
    this.reason = choice.finish_reason ?? this.reason;
    if (!choice.delta.content) return;
    this.firstAt ??= performance.now();
    this.pieces += 1;
    this.text += choice.delta.content;
    this.draw(false);
  }

  tellWaiting(job) {
    if (this.text !== "") return;
    const ahead = job.state === "queued" && job.position !== null ? `, ${counted(job.position, "job")} ahead` : "";
    const starts = job.estimated_start_at === null ? null : job.estimated_start_at - Date.now() / 1000;
    const when = job.state === "queued" && starts !== null && starts > 1 ? `, starts in about ${span(starts)}` : "";
    this.why = `${job.state === "running" ? "reading the prompt" : "queued"}${ahead}${when}`;
    this.tellTime();
  }

  /** End it; `how` says why if it did not end by itself. */
  end(how = null) {
    this.finish();
    setText(this.note, [how ?? (this.reason === "length" ? "cut off at the most tokens" : null), ...this.figures()]
      .filter((part) => part !== null)
      .join(" · "));
  }

  fail(text, again) {
    this.finish();
    this.note.replaceChildren(element("span", { class: "error", role: "alert", text }), " ", again);
    this.toEnd();
  }

  remove() {
    this.shown.remove();
  }

  finish() {
    clearInterval(this.clock);
    this.draw(true);
    this.shown.classList.remove("growing");
    if (this.text === "") this.said.remove();
  }

  figures() {
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const seconds = (performance.now() - (this.firstAt ?? this.began)) / 1000;
    const rate = this.firstAt !== null && tokens > 1 && seconds > 0 ? `${figure((tokens - 1) / seconds)} tokens/s` : null;
    const first = this.firstAt === null ? null : `first after ${span((this.firstAt - this.began) / 1000)}`;
    return [counted(tokens, "token"), rate, first];
  }

  tellTime() {
    const waited = span((performance.now() - this.began) / 1000);
    if (this.text === "") setText(this.note, `${this.why ?? "waiting"} · ${waited}`);
    else setText(this.note, this.figures().filter((part) => part !== null).join(" · "));
  }

  /** Draw the text soon, or now; the longer drawing takes the rarer it is done. */
  draw(isLast) {
    if (isLast) clearTimeout(this.drawing);
    else if (this.drawing !== 0) return;
    const paint = () => {
      const began = performance.now();
      const isAtEnd = this.isAtEnd();
      this.said.replaceChildren(...markdown(this.text));
      if (isAtEnd) this.toEnd();
      this.cost = performance.now() - began;
      this.drawing = 0;
    };
    if (isLast) paint();
    else this.drawing = setTimeout(paint, Math.max(30, (this.cost ?? 0) / MOST_RENDERING));
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}

function message(who, ...children) {
  return element("article", { class: `message ${who === "You" ? "user" : "answer"}` }, element("span", { class: "who", text: who }), ...children);
}
