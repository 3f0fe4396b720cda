// Workers, what of their models lies where, queues, and plots of the last minutes.

import { ask } from "./api.js";
import { byId, element, keepInStep, setShown, setText } from "./dom.js";
import { NONE, age, bytes, counted, figure, span, whole } from "./format.js";
import { History } from "./history.js";
import { Plot } from "./plot.js";

const TIERS = [
  ["vram", "VRAM"],
  ["ram", "RAM"],
  ["disk", "disk"],
];

export class Fleet {
  constructor() {
    this.account = null;
    this.history = new History();
    this.tokens = new Plot(byId("plot-tokens"), "Tokens a second", "tok/s");
    this.sweeps = new Plot(byId("plot-sweeps"), "Seconds a sweep", "s");
  }

  open(account) {
    this.account = account;
    this.history.clear();
    for (const id of ["plots", "worker-cards"]) setShown(byId(id), account.is_admin);
    setShown(byId("workers-note"), !account.is_admin);
    setShown(byId("workers-empty"), false);
    byId("worker-cards").replaceChildren();
  }

  /** Ask how things stand; `isShown` says whether somebody looks, otherwise only the plots' figures are kept. */
  async refresh(isShown) {
    const [workers, queues] = await Promise.all([
      this.account.is_admin ? ask("lamella/workers") : null,
      isShown ? ask("lamella/queues") : null,
    ]);
    if (workers !== null) this.history.add(workers.at, workers.data);
    if (!isShown) return;
    this.showTiles(workers?.data ?? null, queues.data);
    this.showQueues(queues.data);
    if (workers !== null) this.showWorkers(workers.data, workers.at);
  }

  showTiles(workers, queues) {
    const sum = (items, pick) => items.reduce((all, item) => all + pick(item), 0);
    const waiting = ["Waiting", whole(sum(queues, (queue) => queue.waiting))];
    const tiles =
      workers === null
        ? [["Models", String(queues.filter((queue) => queue.workers > 0).length)], ["In flight", whole(sum(queues, (queue) => queue.in_flight))], waiting]
        : [
            ["Workers", String(workers.length)],
            ["Slots busy", `${sum(workers, (worker) => worker.running)} of ${sum(workers, (worker) => worker.slots)}`],
            waiting,
            ["Tokens/s", figure(this.history.total().points.at(-1)?.[1] ?? null)],
          ];
    keepInStep(
      byId("tiles"),
      tiles,
      ([name]) => name,
      ([name]) => element("div", { class: "card" }, element("dt", { text: name }), element("dd")),
      (tile, [, value]) => setText(tile.lastElementChild, value),
    );
  }

  showWorkers(workers, at) {
    setShown(byId("workers-empty"), workers.length === 0);
    const lines = this.history.lines("tokens");
    this.tokens.show(lines.length > 1 ? [this.history.total(), ...lines] : lines, at);
    this.sweeps.show(this.history.lines("sweeps"), at);
    keepInStep(byId("worker-cards"), workers, (worker) => worker.name, workerCard, (card, worker) =>
      updateCard(card, worker, this.history.rate(worker.name), at),
    );
  }

  showQueues(queues) {
    setShown(byId("queues-empty"), queues.length === 0);
    setShown(byId("queue-table"), queues.length > 0);
    const names = ["Model", "Workers", "Slots", "In flight", "Waiting", "Oldest waits"];
    keepInStep(
      byId("queue-table").tBodies[0],
      queues,
      (queue) => queue.model,
      () => element("tr", {}, ...names.map((name, i) => element("td", { "data-label": name, class: i === 0 ? "name" : "figure" }))),
      (row, queue) => {
        const counts = [queue.workers, queue.slots, queue.in_flight, queue.waiting].map(whole);
        [queue.model, ...counts, age(queue.oldest_s)].forEach((value, i) => setText(row.cells[i], value));
        row.classList.toggle("warn", queue.workers === 0);
      },
    );
  }
}

function workerCard() {
  return element(
    "article",
    { class: "card worker" },
    element("header", {}, element("h3"), element("span", { class: "state" })),
    element("p", { class: "hint where" }),
    element("p", { class: "error trouble", hidden: true }),
    element("ul", { class: "served" }),
    element("div", { class: "tiers" }, element("div", { class: "tier-bar", role: "img" }), element("ul", { class: "tier-key" })),
    element("dl", { class: "facts" }),
  );
}

function updateCard(card, worker, rate, at) {
  const find = (selector) => card.querySelector(selector);
  setText(find("h3"), worker.name);
  setText(find(".state"), worker.state);
  find(".state").dataset.state = worker.state;
  setText(find(".where"), `${worker.device} on ${worker.host}, version ${worker.version}`);
  setText(find(".trouble"), worker.engine?.trouble ?? "");
  setShown(find(".trouble"), Boolean(worker.engine?.trouble));
  keepInStep(find(".served"), worker.models, (model) => model.name, servedModel, updateModel);
  showPlan(find(".tier-bar"), find(".tier-key"), worker.plan);
  const facts = [
    ["Slots", `${worker.running} of ${worker.slots}`],
    ["Tokens/s", figure(rate?.tokens ?? null)],
    ["Sweep", rate === null || rate.sweep === null ? NONE : span(rate.sweep)],
    ["Tokens", whole(worker.tokens)],
    ["Sweeps", whole(worker.sweeps)],
    ["Peak memory", bytes(worker.peak_rss_bytes)],
    ["Up", age(at - worker.started_at)],
    ["Heartbeat", `${age(at - worker.heartbeat_at)} ago`],
    ...(worker.engine?.restarts > 0 ? [["Restarts", String(worker.engine.restarts)]] : []),
  ];
  keepInStep(
    find("dl"),
    facts,
    ([name]) => name,
    ([name]) => element("div", {}, element("dt", { text: name }), element("dd")),
    (fact, [, value]) => setText(fact.lastElementChild, value),
  );
}

function servedModel() {
  return element("li", {}, element("b", { class: "name" }), element("span", { class: "hint" }), element("meter", { min: "0" }));
}

function updateModel(item, model) {
  const [name, about, meter] = item.children;
  setText(name, model.name);
  setText(about, `${model.family}, ${counted(model.num_layers, "layer")}, ${model.dtype}, ${bytes(model.size_bytes)}`);
  meter.max = Math.max(1, model.slots);
  meter.value = model.running;
  meter.setAttribute("aria-label", `${model.running} of ${counted(model.slots, "slot")} busy`);
  meter.title = meter.getAttribute("aria-label");
}

/** Show what each sweep takes from VRAM, RAM and disk: every sweep passes all layers, so that is where they live. */
function showPlan(bar, key, plan) {
  if (plan === null) {
    bar.replaceChildren();
    bar.setAttribute("aria-label", "What lies where is known after the first sweep");
    keepInStep(key, ["unknown"], (item) => item, () => element("li", { text: "what lies where is known after the first sweep" }), () => {});
    return;
  }
  const all = TIERS.reduce((sum, [tier]) => sum + plan[tier], 0);
  const shown = TIERS.filter(([tier]) => plan[tier] > 0);
  keepInStep(bar, shown, ([tier]) => tier, ([tier]) => element("span", { class: `tier ${tier}` }), (part, [tier]) => {
    part.style.flexGrow = String(plan[tier] / all);
  });
  keepInStep(key, TIERS, ([tier]) => tier, ([tier]) => element("li", { class: `tier-name ${tier}` }), (item, [tier, name]) =>
    setText(item, `${name} ${plan[tier] === 0 ? "0" : `${bytes(plan[tier])}, ${Math.round((plan[tier] / all) * 100)} %`}`),
  );
  bar.setAttribute("aria-label", `Layers by where they wait: ${TIERS.map(([tier, name]) => `${name} ${bytes(plan[tier])}`).join(", ")}`);
}
