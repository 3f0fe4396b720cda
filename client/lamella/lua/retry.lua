-- Lets a dead job (failed, out of attempts) go on as a new job after its last token. Repeating it returns the same new job.
-- KEYS dead job, dead stream, new job, new stream, active, jobs, queue list
-- ARGV new job_id, message, version, max_queued, jobs_listed, code of a dead job's failure
-- Returns {retried|not_dead|missing|unknown_schema|full, id of the job that goes on, events it begins with}
local job = redis.call('HMGET', KEYS[1], 'state', 'v', 'outcome', 'retried_as', 'model', 'request', 'seq')
if not job[1] then return {'missing', '', 0} end
if job[2] ~= ARGV[3] then return {'unknown_schema', '', 0} end
if job[4] then return {'retried', job[4], 0} end
if job[1] ~= 'failed' or cjson.decode(job[3]).code ~= ARGV[6] then return {'not_dead', '', 0} end
if redis.call('LLEN', KEYS[7]) >= tonumber(ARGV[4]) then return {'full', '', 0} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- The last event is the failure, all before it are tokens. If some are gone, the new job begins anew.
local seq = tonumber(job[7]) - 1
if redis.call('XLEN', KEYS[2]) ~= seq + 1 then seq = 0 end
local copied = 0
while copied < seq do
  local page = redis.call('XRANGE', KEYS[2], string.format('%d-0', copied + 1), string.format('%d-0', seq), 'COUNT', 1000)
  for _, entry in ipairs(page) do
    redis.call('XADD', KEYS[4], entry[1], unpack(entry[2]))
    copied = copied + 1
  end
end
redis.call('HSET', KEYS[3], 'v', ARGV[3], 'state', 'queued', 'model', job[5], 'request', job[6],
  'message', ARGV[2], 'created_at', now, 'attempts', 0, 'fence', 0, 'lease_until', 0, 'seq', seq,
  'nudged_at', now, 'nudges', 0)
redis.call('HSET', KEYS[1], 'retried_as', ARGV[1])
redis.call('ZADD', KEYS[5], now, ARGV[1])
redis.call('ZADD', KEYS[6], now, ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[6], 0, -(tonumber(ARGV[5]) + 1))
redis.call('LPUSH', KEYS[7], ARGV[2])
return {'retried', ARGV[1], seq}
