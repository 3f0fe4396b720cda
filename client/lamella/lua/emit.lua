-- Appends the next events of several jobs, each under its own fence, and renews their leases; none of the events ends
-- its job. Where a job has no event it only renews. Repeating a call whose answer was lost is harmless: what is stored
-- is not stored again. One call for many jobs, as starting a script costs the server more than what it does for one.
-- KEYS job and stream of each
-- ARGV prefix, ttl_s; then of each job: job_id, fence, first_seq, lease_ms, tokens in its events, how many these are,
--   event JSON...
-- Returns of each: ok|fenced|missing|gap, stop (0 no, 1 cancel requested, 2 deadline passed); in one list
local now = now_ms()

local function emit(job, stream, at)
  local job_id, first, events = ARGV[at], tonumber(ARGV[at + 2]), tonumber(ARGV[at + 5])
  local held = redis.call('HMGET', job, 'fence', 'seq', 'cancel', 'state', 'deadline', 'tokens')
  local seq, stop = tonumber(held[2] or nil), order(held[3], tonumber(held[5] or nil), now)
  local answer = unfit(held[1], held[4], seq, ARGV[at + 1], first, events)
  if answer then return answer, stop end
  store(stream, seq, at + 5, events)
  redis.call('HSET', job, 'lease_until', now + tonumber(ARGV[at + 3]), 'seq', seq + events,
    'tokens', number(held[6]) + tonumber(ARGV[at + 4]))
  tell(job_id, seq, at + 5, events)
  return 'ok', stop
end

local answers, at = {}, 3
for i = 1, #KEYS, 2 do
  answers[i], answers[i + 1] = emit(KEYS[i], KEYS[i + 1], at)
  at = at + 6 + tonumber(ARGV[at + 5])
end
return answers
