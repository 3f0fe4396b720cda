// What workers did over the last minutes, made from their heartbeats; kept in the page alone.

const COLOURS = 8;
const KEPT_S = 600;
const OVER_S = 9.5; // rates are of the last ten seconds,
const LONGEST_S = 120; // or of so long, where a sweep takes longer

export class History {
  constructor() {
    this.clear();
  }

  clear() {
    this.beats = new Map();
    this.rates = new Map();
    this.colours = new Map(); // by worker, in the order they came, the same in every plot
    this.samples = []; // {at, tokens: Map(worker -> tokens/s), sweeps: Map(worker -> s/sweep)}
  }

  /** Take a look at the workers; `at` is the gateway's clock. */
  add(at, workers) {
    const live = new Set(workers.map((worker) => worker.name));
    for (const known of [this.beats, this.rates]) {
      for (const name of known.keys()) if (!live.has(name)) known.delete(name);
    }
    const sample = { at, tokens: new Map(), sweeps: new Map() };
    for (const worker of workers) {
      this.note(worker);
      if (!this.colours.has(worker.name)) this.colours.set(worker.name, `c${this.colours.size % COLOURS}`);
      const rate = this.rates.get(worker.name);
      if (rate === undefined) continue;
      sample.tokens.set(worker.name, rate.tokens);
      if (rate.sweep !== null) sample.sweeps.set(worker.name, rate.sweep);
    }
    this.samples.push(sample);
    while (this.samples.length > 0 && this.samples[0].at < at - KEPT_S) this.samples.shift();
  }

  note(worker) {
    const beats = this.beats.get(worker.name) ?? [];
    const last = beats.at(-1);
    if (last !== undefined && last.heartbeat_at === worker.heartbeat_at) return; // what it told still holds
    const isAnew =
      last !== undefined &&
      (last.started_at !== worker.started_at || worker.sweeps < last.sweeps || worker.heartbeat_at < last.heartbeat_at);
    const kept = isAnew ? [] : beats.filter((beat) => beat.heartbeat_at > worker.heartbeat_at - LONGEST_S);
    kept.push(worker);
    this.beats.set(worker.name, kept);
    if (kept.length > 1) this.rates.set(worker.name, rateOf(kept));
    else this.rates.delete(worker.name);
  }

  /** Return the lines of a plot, one a worker: {name, colour, points: [[at, value], ...]}. */
  lines(which) {
    const found = new Map();
    for (const sample of this.samples) {
      for (const [name, value] of sample[which]) {
        if (!found.has(name)) found.set(name, []);
        found.get(name).push([sample.at, value]);
      }
    }
    return [...found].sort(([a], [b]) => (a < b ? -1 : 1)).map(([name, points]) => ({ name, points, colour: this.colours.get(name) }));
  }

  /** Return the line of all workers together. */
  total() {
    const points = this.samples
      .filter((sample) => sample.tokens.size > 0)
      .map((sample) => [sample.at, [...sample.tokens.values()].reduce((sum, value) => sum + value, 0)]);
    return { name: "all", points, colour: "c-all" };
  }

  rate(name) {
    return this.rates.get(name) ?? null;
  }
}

/** Return tokens a second and seconds a sweep (null while nothing runs) from heartbeats, oldest first. */
function rateOf(beats) {
  const now = beats.at(-1);
  let from = beats.findLastIndex((beat) => now.heartbeat_at - beat.heartbeat_at >= OVER_S);
  if (from < 0) from = 0;
  if (now.running > 0) while (from > 0 && beats[from].sweeps === now.sweeps) from -= 1;
  const tokens = (now.tokens - beats[from].tokens) / (now.heartbeat_at - beats[from].heartbeat_at);
  const idle = beats.findLastIndex((beat) => beat.running === 0 || beat.last_sweep_at === null);
  const busy = beats[Math.max(from, idle + 1)]; // a pause is no part of a sweep
  const sweeps = busy === undefined ? 0 : now.sweeps - busy.sweeps;
  return { tokens, sweep: sweeps > 0 ? (now.last_sweep_at - busy.last_sweep_at) / sweeps : null };
}
