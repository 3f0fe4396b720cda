-- Where a job stands in the queue; changes nothing.
-- KEYS job     ARGV prefix, ttl_s, job_id
-- Returns {jobs before it, ms to its start, ms to its end, slots, tokens a second in a slot x 1000, jobs measured};
--   -1 where that cannot be told
local job_id = ARGV[3]
local held = redis.call('HMGET', KEYS[1], 'model', 'state', 'user', 'class', 'cost', 'place', 'prompt_cost', 'tokens')
local model, cost, place = held[1], number(held[5]), held[6]
if not model or is_final(held[2]) or not place then return {-1, -1, -1, 0, 0, 0} end
local q = redis.call('HMGET', book(model), 'rate', 'ratio', 'samples', 'tf')
local slots = number(redis.call('GET', P .. 'capacity:' .. model))
local rate, samples = math.floor(1000 * number(q[1])), number(q[3])
if place == 'ready' then
  local key = line(model, held[4], held[3])
  local before = number(redis.call('ZRANK', key, job_id))
  local mine = redis.call('ZCARD', key)
  local position, start, stop = outlook(model, tonumber(held[4]), held[3], cost, before, mine, 1)
  return {position, start, stop, slots, rate, samples}
end
-- Sent, or running: what is left of what such jobs really use. Of those sent, one may still wait for a slot.
local start, done = -1, number(held[7]) + number(held[8])
if held[2] == 'queued' then start, done = 0, 0 end
if rate <= 0 then return {0, -1, -1, slots, rate, samples} end
local flying = redis.call('ZCARD', flight(model))
if held[2] == 'queued' and flying > slots and slots > 0 then
  start = math.floor(1000000 * number(q[2]) * number(q[4]) / flying / (rate * slots))
end
local left = math.max(cost * number(q[2]) - done, 1)
return {0, start, math.max(start, 0) + math.floor(1000000 * left / rate), slots, rate, samples}
