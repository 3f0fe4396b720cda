// The list of jobs: one's own, or everybody's for an administrator; details, cancel, retry.

import { ask } from "./api.js";
import { byId, carefulButton, element, keepInStep, setShown, setText } from "./dom.js";
import { NONE, age, counted, figure, moment, span, whole } from "./format.js";

const PAGE = 50;
const MOST = 200;

export class Jobs {
  constructor() {
    this.account = null;
    this.limit = PAGE;
    this.rows = byId("job-table").tBodies[0];
    byId("job-state").addEventListener("change", () => {
      this.limit = PAGE;
      this.refresh().catch((error) => this.say(error.message));
    });
    byId("more-jobs").addEventListener("click", () => {
      this.limit = Math.min(MOST, this.limit + PAGE);
      this.refresh().catch((error) => this.say(error.message));
    });
  }

  open(account) {
    this.account = account;
    this.limit = PAGE;
    this.rows.replaceChildren();
    this.say("");
    setText(byId("jobs-note"), account.is_admin ? "Jobs of all users, newest first." : `Jobs of ${account.user}, newest first.`);
    byId("job-table").classList.toggle("no-user", !account.is_admin);
  }

  /** Ask for the jobs and show them. */
  async refresh() {
    const state = byId("job-state").value;
    const { at, data } = await ask(`lamella/jobs?limit=${this.limit}${state === "" ? "" : `&state=${state}`}`);
    if (state !== byId("job-state").value) return; // another choice is under way
    const items = data.flatMap((job) => (this.isOpen(job.id) ? [job, { ...job, isDetail: true }] : [job]));
    keepInStep(
      this.rows,
      items,
      (job) => (job.isDetail ? `${job.id}+` : job.id),
      (job) => (job.isDetail ? detailRow(job) : this.row(job)),
      (row, job) => (job.isDetail ? updateDetail(row, job) : updateRow(row, job, at)),
    );
    setShown(byId("jobs-empty"), data.length === 0);
    setShown(byId("job-table"), data.length > 0);
    setText(byId("jobs-empty"), state === "" ? "No job yet." : `No job is ${state}.`);
    setShown(byId("more-jobs"), data.length === this.limit && this.limit < MOST);
  }

  isOpen(id) {
    return this.rows.querySelector(`[data-key="${CSS.escape(id)}"] [aria-expanded="true"]`) !== null;
  }

  row(job) {
    const opener = element("button", {
      type: "button",
      class: "link mono",
      "aria-expanded": "false",
      title: job.id,
      text: job.id.slice(0, 8),
      on: { click: () => this.toggle(opener) },
    });
    const cell = (name, attributes = {}) => element("td", { "data-label": name, ...attributes });
    const row = element(
      "tr",
      {},
      element("td", { "data-label": "State" }, element("span", { class: "state" })),
      element("td", { "data-label": "Job" }, opener),
      cell("Model", { class: "name" }),
      cell("User", { class: "name user" }),
      cell("Tokens", { class: "figure" }),
      cell("Age", { class: "figure" }),
      cell("Time", { class: "figure" }),
      element(
        "td",
        { class: "actions" },
        carefulButton("Cancel", "Really cancel?", () => this.act(job.id, "cancel")),
        element("button", { type: "button", class: "small", text: "Retry", on: { click: () => this.act(job.id, "retry") } }),
      ),
    );
    return row;
  }

  async toggle(opener) {
    const isOpen = opener.getAttribute("aria-expanded") === "true";
    opener.setAttribute("aria-expanded", String(!isOpen));
    await this.refresh().catch((error) => this.say(error.message));
  }

  /** Cancel or retry a job. */
  async act(id, what) {
    try {
      const job = await ask(`lamella/jobs/${encodeURIComponent(id)}/${what}`, "POST");
      this.say(what === "retry" ? `Goes on as job ${job.id.slice(0, 8)}.` : "", false);
      await this.refresh();
    } catch (error) {
      this.say(error.message);
    }
  }

  say(text, isError = true) {
    const said = byId("jobs-said");
    setText(said, text);
    said.classList.toggle("error", isError);
    setShown(said, text !== "");
  }
}

function updateRow(row, job, at) {
  const [state, , model, user, tokens, since, time, actions] = row.cells;
  const isFinal = job.finished_at !== null;
  const badge = state.firstElementChild;
  const shown = job.cancel_requested && !isFinal ? "cancelling" : job.state;
  setText(badge, shown);
  badge.dataset.state = shown;
  setText(model, job.model);
  setText(user, job.user ?? NONE);
  const events = isFinal ? job.events - 1 : job.events; // the last one says how it ended
  setText(tokens, whole(job.completion_tokens ?? Math.max(0, events)));
  setText(since, age(at - job.created_at));
  setText(time, job.started_at === null ? NONE : span((job.finished_at ?? at) - job.started_at));
  const [cancel, retry] = actions.children;
  setShown(cancel, !isFinal && !job.cancel_requested);
  setShown(retry, job.can_retry);
}

function detailRow() {
  return element("tr", { class: "detail" }, element("td", { colspan: "8" }, element("dl", { class: "facts" })));
}

async function updateDetail(row, listed) {
  const isLive = listed.finished_at === null;
  const job = isLive ? await ask(`lamella/jobs/${encodeURIComponent(listed.id)}`).catch(() => listed) : listed;
  const facts = [
    ["Id", job.id],
    ["Priority", job.priority],
    ["Worker", job.worker],
    ["Attempts", String(job.attempts)],
    ["Position", job.position === null ? null : `${counted(job.position, "job")} ahead`],
    ["Starts about", job.started_at !== null || job.estimated_start_at === null ? null : moment(job.estimated_start_at)],
    ["Ends about", job.estimated_end_at === null ? null : moment(job.estimated_end_at)],
    ["Deadline", job.deadline_at === null ? null : moment(job.deadline_at)],
    ["Accepted", moment(job.created_at)],
    ["Started", job.started_at === null ? null : moment(job.started_at)],
    ["Ended", job.finished_at === null ? null : moment(job.finished_at)],
    ["Ended by", job.finish_reason],
    ["Prompt", job.prompt_tokens === null ? null : counted(job.prompt_tokens, "token")],
    ["Answer", job.completion_tokens === null ? null : counted(job.completion_tokens, "token")],
    ["Speed", job.run_s && job.completion_tokens ? `${figure(job.completion_tokens / job.run_s)} tokens/s` : null],
    ["Sweeps", job.sweeps === null ? null : String(job.sweeps)],
    ["Error", job.error === null ? null : `${job.error.code}: ${job.error.message}`],
  ].filter(([, value]) => value !== null);
  keepInStep(
    row.querySelector("dl"),
    facts,
    ([name]) => name,
    ([name]) => element("div", {}, element("dt", { text: name }), element("dd")),
    (fact, [, value]) => setText(fact.lastElementChild, value),
  );
}
