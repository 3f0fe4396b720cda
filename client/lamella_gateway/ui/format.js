// Figures as people read them: bytes, seconds, counts.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
export const NONE = "–";

/** Return bytes with a unit: 1.7 GiB. */
export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

/** Return a time span: 340 ms, 12.3 s, 4 min 5 s, 3 h 20 min. */
export function span(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NONE;
  const s = Math.max(0, seconds);
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${s.toFixed(1)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Return a time span in whole units, for figures that tick: 12 s, 4 min, 3 h. */
export function age(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  const s = Math.max(0, seconds);
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

/** Return a rate or another figure with as many digits as tell something. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value === 0) return "0";
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return value.toPrecision(Math.abs(value) >= 1 ? 3 : 2);
}

/** Return a whole number with its thousands apart. */
export function whole(value) {
  return value.toLocaleString("en");
}

/** Return a moment (Unix seconds) as the reader's clock and calendar tell it. */
export function moment(seconds) {
  return seconds === null || seconds === undefined ? NONE : new Date(seconds * 1000).toLocaleString();
}

/** Return a count with its noun: 1 job, 2 jobs. */
export function counted(count, noun) {
  return `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
}
