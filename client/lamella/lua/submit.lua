-- Accepts a job: record, listing and Celery message in one step, or nothing at all.
--
-- The job record (hash job:{id}); times are Redis TIME in Unix ms:
--   v            schema version                      state       queued|running|done|failed|cancelled
--   model        model name                          request     GenerateRequest JSON
--   message      Celery envelope JSON, re-sent by the reconciler
--   created_at   started_at   finished_at            worker      name of the last claimer
--   attempts     claims so far (a drain gives its own back)
--   fence        rises with each claim; a writer with an older fence is refused
--   lease_until  the claim is void after this        seq         highest stored event
--   cancel       1 once requested while running      nudged_at, nudges   reconciler's bookkeeping
--   outcome      terminal event JSON                 retried_as  the job that goes on with this dead one
--
-- KEYS job, active, jobs, queue list, idem (any key if unused)
-- ARGV job_id, version, model, request, message, max_queued, jobs_listed, idem_ttl_s, request_hash ('' = no idempotency)
-- Returns {created|exists|conflict|full|duplicate, job_id, queue length}
local queued = redis.call('LLEN', KEYS[4])
if ARGV[9] ~= '' then
  local prior = redis.call('HMGET', KEYS[5], 'job', 'hash')
  -- A key outlives its job's record; then it stands for nothing and the job is made anew.
  local job_prefix = string.sub(KEYS[1], 1, -1 - #ARGV[1])
  if prior[1] and redis.call('EXISTS', job_prefix .. prior[1]) == 1 then
    if prior[2] == ARGV[9] then return {'exists', prior[1], queued} end
    return {'conflict', prior[1], queued}
  end
end
if redis.call('EXISTS', KEYS[1]) == 1 then return {'duplicate', ARGV[1], queued} end
if queued >= tonumber(ARGV[6]) then return {'full', '', queued} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'v', ARGV[2], 'state', 'queued', 'model', ARGV[3], 'request', ARGV[4],
  'message', ARGV[5], 'created_at', now, 'attempts', 0, 'fence', 0, 'lease_until', 0, 'seq', 0,
  'nudged_at', now, 'nudges', 0)
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -(tonumber(ARGV[7]) + 1))
if ARGV[9] ~= '' then
  redis.call('HSET', KEYS[5], 'job', ARGV[1], 'hash', ARGV[9])
  redis.call('EXPIRE', KEYS[5], ARGV[8])
end
redis.call('LPUSH', KEYS[4], ARGV[5])
return {'created', ARGV[1], queued + 1}
