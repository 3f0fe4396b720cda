-- Lets a dead job (failed, out of attempts) go on as a new job after its last token. Repeating it returns the same new
-- job. It waits like a new job of the same user and class, without a deadline.
-- KEYS dead job, dead stream, new job, new stream
-- ARGV prefix, ttl_s, new job_id, version, max_queued, jobs_listed, code of a dead job's failure,
--   trace ('' = none)
-- Returns {retried|not_dead|missing|unknown_schema|full, id of the job that goes on, events it begins with}
local new_id = ARGV[3]
local dead = redis.call('HMGET', KEYS[1], 'state', 'v', 'outcome', 'retried_as', 'model', 'request', 'seq', 'user',
  'class', 'cost', 'prompt_cost', 'tokens')
if not dead[1] then return {'missing', '', 0} end
if not reads(dead[2], ARGV[4]) then return {'unknown_schema', '', 0} end
if dead[4] then return {'retried', dead[4], 0} end
if dead[1] ~= 'failed' or cjson.decode(dead[3]).code ~= ARGV[7] then return {'not_dead', '', 0} end
local model = dead[5]
local waiting = redis.call('HMGET', book(model), 'n0', 'n1', 'n2')
local most = number(redis.call('HGET', P .. 'limits', 'model_queued'), ARGV[5])
if number(waiting[1]) + number(waiting[2]) + number(waiting[3]) >= most then return {'full', '', 0} end
local now = now_ms()
-- The last event is the failure, all before it are tokens. If some are gone, the new job begins anew.
local seq, tokens = tonumber(dead[7]) - 1, number(dead[12])
if redis.call('XLEN', KEYS[2]) ~= seq + 1 then seq, tokens = 0, 0 end
local copied = 0
while copied < seq do
  local page = redis.call('XRANGE', KEYS[2], string.format('%d-0', copied + 1), string.format('%d-0', seq), 'COUNT', 1000)
  for _, entry in ipairs(page) do
    redis.call('XADD', KEYS[4], entry[1], unpack(entry[2]))
    copied = copied + 1
  end
end
local job = {model = model, user = dead[8] or 'anonymous', class = dead[9] or '1', cost = number(dead[10]),
  order = redis.call('HINCRBY', book(model), 'order', 1)}
redis.call('HSET', KEYS[3], 'v', dead[2], 'state', 'queued', 'model', model, 'request', dead[6], 'created_at', now,
  'attempts', 0, 'fence', 0, 'lease_until', 0, 'seq', seq, 'nudged_at', now, 'nudges', 0, 'user', job.user,
  'class', job.class, 'cost', job.cost, 'prompt_cost', number(dead[11]), 'order', job.order, 'tokens', tokens,
  'place', 'ready')
if ARGV[8] ~= '' then redis.call('HSET', KEYS[3], 'trace', ARGV[8]) end
redis.call('HSET', KEYS[1], 'retried_as', new_id)
count(model, job.user, 'tokens', job.cost)
join_line(new_id, job)
redis.call('ZADD', P .. 'active', now, new_id)
redis.call('ZADD', P .. 'jobs', now, new_id)
redis.call('ZREMRANGEBYRANK', P .. 'jobs', 0, -(tonumber(ARGV[6]) + 1))
dispatch(model, AT_END, now)
return {'retried', new_id, seq}
