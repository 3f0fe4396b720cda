-- A worker tells how many jobs it can run at once (0: none any more); what may be sent now is sent. Called with each
-- heartbeat, so this is also the tick that repairs a dispatch that was missed.
-- All workers are counted when one says something new, and otherwise once a second: a thousand heartbeats a second that
-- each look at a thousand workers would leave the server no time for jobs.
-- KEYS serving     ARGV prefix, ttl_s, worker, model, slots, ms after which a worker that is silent counts no more
-- Returns {slots of all workers of the model, jobs sent}
local model, now, alive_ms = ARGV[4], now_ms(), tonumber(ARGV[6])
local COUNT_MS = 1000
local before = redis.call('HGET', KEYS[1], ARGV[3])
local known = redis.call('GET', P .. 'capacity:' .. model)
local counted = number(redis.call('HGET', book(model), 'counted'))
local is_news = (before and string.match(before, '^%d+') or '0') ~= ARGV[5]
if ARGV[5] == '0' then redis.call('HDEL', KEYS[1], ARGV[3])
else redis.call('HSET', KEYS[1], ARGV[3], string.format('%d %d', ARGV[5], now)) end
redis.call('PEXPIRE', KEYS[1], alive_ms)
if known and not is_news and now >= counted and now - counted < COUNT_MS then
  redis.call('PEXPIRE', P .. 'capacity:' .. model, alive_ms)
  return {tonumber(known), dispatch(model, 1000, now)}
end
local all, total = redis.call('HGETALL', KEYS[1]), 0
for i = 1, #all, 2 do
  local slots, at = string.match(all[i + 1], '^(%d+) (%d+)$')
  if not at or now - tonumber(at) > alive_ms then redis.call('HDEL', KEYS[1], all[i])
  else total = total + tonumber(slots) end
end
redis.call('HSET', book(model), 'counted', now)
if total == 0 then redis.call('DEL', P .. 'capacity:' .. model)
else redis.call('SET', P .. 'capacity:' .. model, total, 'PX', alive_ms) end
return {total, dispatch(model, 1000, now)}
