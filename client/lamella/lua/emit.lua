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
  local fence, seq, deadline = held[1], tonumber(held[2] or nil), tonumber(held[5] or nil)
  if not fence then return 'missing', 0 end
  if fence ~= ARGV[at + 1] then return 'fenced', 0 end
  local stop = 0
  if held[3] then stop = 1 elseif deadline and deadline <= now then stop = 2 end
  if events > 0 and seq == first + events - 1 then return 'ok', stop end
  if held[4] ~= 'running' then return 'fenced', 0 end
  if events > 0 and seq ~= first - 1 then return 'gap', stop end
  local body = at + 5
  for i = 1, events do
    redis.call('XADD', stream, string.format('%d-0', seq + i), 'e', ARGV[body + i])
  end
  redis.call('HSET', job, 'lease_until', now + tonumber(ARGV[at + 3]), 'seq', seq + events,
    'tokens', number(held[6]) + tonumber(ARGV[at + 4]))
  for i = 1, events do
    redis.call('PUBLISH', P .. 'ch:' .. job_id, string.format('%d ', seq + i) .. ARGV[body + i])
  end
  return 'ok', stop
end

local answers, at = {}, 3
for i = 1, #KEYS, 2 do
  answers[i], answers[i + 1] = emit(KEYS[i], KEYS[i + 1], at)
  at = at + 6 + tonumber(ARGV[at + 5])
end
return answers
