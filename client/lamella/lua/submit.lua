-- Accepts a job: record, listing and its place in the queue in one step, or nothing at all. If a worker is idle, its
-- Celery message goes out in the same step.
--
-- The job record (hash job:{id}); times are Redis TIME in Unix ms:
--   v            schema version                      state       queued|running|done|failed|cancelled
--   model        model name                          request     GenerateRequest JSON
--   created_at   started_at   finished_at            worker      name of the last claimer
--   attempts     claims so far (a drain gives its own back)
--   fence        rises with each claim; a writer with an older fence is refused
--   lease_until  the claim is void after this        seq         highest stored event
--   tokens       tokens emitted                      sends       Celery messages sent
--   cancel       1 once requested while running      nudged_at, nudges   reconciler's bookkeeping
--   response, billed, forget: the gateway's, see attach.lua and settle.lua
--   outcome      terminal event JSON                 retried_as  the job that goes on with this dead one
--   user, class, cost, prompt_cost, order, deadline, place, charge: see _queue.lua
--   trace        W3C traceparent of who asked for it, if that is traced
--   message      Celery envelope; only in records of versions without this queue
--
-- KEYS job, idem (any key if unused)
-- ARGV prefix, ttl_s, job_id, version, model, request, max_queued, jobs_listed, idem_ttl_s, request_hash ('' = none),
--   user, class, prompt_cost, max_tokens, deadline_ms from now (0 = none), tokens it must bring, trace ('' = none),
--   1 if a live worker must serve the model (may be left out)
-- Returns {created|exists|conflict|full|user_full|user_tokens|hopeless|duplicate, job_id, jobs (or tokens) waiting, limit,
--   retry after ms, estimated ms to its start}
local job_id, model, user, class = ARGV[3], ARGV[5], ARGV[11], ARGV[12]
local MARGIN = 2  -- an estimate must be over by this factor before a job is refused for it
local SAMPLES = 8  -- and so many jobs must have ended

local share = redis.call('HMGET', P .. 'share:' .. model .. ':' .. user, 'queued', 'tokens')
local waiting = redis.call('HMGET', book(model), 'n0', 'n1', 'n2', 'samples')
local queued = number(waiting[1]) + number(waiting[2]) + number(waiting[3])
if ARGV[10] ~= '' then
  local prior = redis.call('HMGET', KEYS[2], 'job', 'hash')
  -- A key outlives its job's record; then it stands for nothing and the job is made anew.
  if prior[1] and redis.call('EXISTS', record(prior[1])) == 1 then
    return {prior[2] == ARGV[10] and 'exists' or 'conflict', prior[1], queued, 0, 0, 0}
  end
end
if redis.call('EXISTS', KEYS[1]) == 1 then return {'duplicate', job_id, queued, 0, 0, 0} end

if ARGV[18] == '1' and number(redis.call('GET', P .. 'capacity:' .. model)) == 0 then
  return {'unserved', '', queued, 0, 0, 0}
end

local cost = number(ARGV[13]) + number(ARGV[14])
local limits = limits_of(user)
local most = limits.model_queued or tonumber(ARGV[7])
if queued >= most then return {'full', '', queued, most, retry_ms(model, 1), 0} end
local over, held, limit = nil, nil, nil
if limits.queued and number(share[1]) >= limits.queued then
  over, held, limit = 'user_full', number(share[1]), limits.queued
elseif limits.tokens and number(share[2]) + cost > limits.tokens then
  over, held, limit = 'user_tokens', number(share[2]), limits.tokens
end
if over then
  local sharers = math.max(redis.call('ZCARD', users('ready', model, class)), 1)
  return {over, '', held, limit, retry_ms(model, sharers), 0}
end
local now, span = now_ms(), number(ARGV[15])
if span > 0 and number(waiting[4]) >= SAMPLES then
  local mine = redis.call('ZCARD', line(model, class, user))
  local _, start, _, least = outlook(model, number(class), user, cost, mine, mine, number(ARGV[16]))
  if start >= 0 and start + least > MARGIN * span then
    return {'hopeless', '', queued, 0, retry_ms(model, 1), start + least}
  end
end

local job = {model = model, user = user, class = class, cost = cost,
  order = redis.call('HINCRBY', book(model), 'order', 1)}
redis.call('HSET', KEYS[1], 'v', ARGV[4], 'state', 'queued', 'model', model, 'request', ARGV[6], 'created_at', now,
  'attempts', 0, 'fence', 0, 'lease_until', 0, 'seq', 0, 'nudged_at', now, 'nudges', 0, 'user', user, 'class', class,
  'cost', cost, 'prompt_cost', ARGV[13], 'order', job.order, 'place', 'ready')
if ARGV[17] ~= '' then redis.call('HSET', KEYS[1], 'trace', ARGV[17]) end
if span > 0 then
  redis.call('HSET', KEYS[1], 'deadline', now + span)
  redis.call('ZADD', P .. 'deadlines', now + span, job_id)
end
count(model, user, 'tokens', cost)
join_line(job_id, job)
redis.call('ZADD', P .. 'active', now, job_id)
redis.call('ZADD', P .. 'jobs', now, job_id)
redis.call('ZREMRANGEBYRANK', P .. 'jobs', 0, -(tonumber(ARGV[8]) + 1))
if ARGV[10] ~= '' then
  redis.call('HSET', KEYS[2], 'job', job_id, 'hash', ARGV[10])
  redis.call('EXPIRE', KEYS[2], ARGV[9])
end
dispatch(model, AT_END, now)
return {'created', job_id, queued + 1, 0, 0, 0}
