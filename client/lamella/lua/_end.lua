-- How a job leaves the queue for good. Every script that ends a job goes through `settle`, so counters and virtual times
-- always fit what is there. `finish` also writes the last event, for jobs that no worker ends.
local CANCELLED = '{"type":"cancelled"}'
local function deadline_event()
  return '{"type":"failed","code":"deadline","message":"the job\'s deadline passed before it ended; the text up '
    .. 'to there is kept. Submit it again with a longer deadline_s, a smaller max_tokens or a higher priority, or when '
    .. 'fewer jobs wait."}'
end
local LEARN = 0.1  -- weight of the newest job in the running means

-- What an undisturbed job tells: tokens a second in a slot (prompt included), tokens used of those estimated, and the
-- fastest pace at which a job's own tokens ever came.
local function learn(job, used, now)
  if job.attempts ~= 1 or not job.started_at or job.tokens < 1 or job.cost < 1 then return end
  local seconds = math.max(now - job.started_at, 1) / 1000
  local known = redis.call('HMGET', book(job.model), 'samples', 'rate', 'ratio', 'best')
  local rate, ratio = used / seconds, used / job.cost
  if known[1] then
    rate = number(known[2]) + LEARN * (rate - number(known[2]))
    ratio = number(known[3]) + LEARN * (ratio - number(known[3]))
  end
  redis.call('HSET', book(job.model), 'samples', math.min(number(known[1]) + 1, 1000000), 'rate', exact(rate),
    'ratio', exact(ratio), 'best', exact(math.max(number(known[4]), job.tokens / seconds)))
end

-- Takes a job out of wherever it is, and charges what it really used in place of what was estimated. Its record still
-- names its place, which is for the caller to change.
local function settle(job_id, job, used, now)
  if job.place == 'ready' then
    leave_line(job_id, job)
  elseif job.place == 'sent' then
    leave_flight(job_id, job)
    if job.state == 'queued' and job.sends > 0 then
      redis.call('LREM', P .. 'generate.' .. job.model, 1, celery_message(job_id, job.model, job.sends, job.trace))
    end
    local spent = used or (job.attempts > 0 and job.prompt_cost + job.tokens or 0)
    local owed = job.cost > 0 and job.charge * (spent / job.cost - 1) or 0
    if owed ~= 0 then shift_user(job.model, job.class, job.user, owed) end
    if used then learn(job, used, now) end
  end
  if job.place then count(job.model, job.user, 'tokens', -job.cost) end
  if job.deadline or not job.state then redis.call('ZREM', P .. 'deadlines', job_id) end
  redis.call('ZREM', P .. 'active', job_id)
end

-- The same for a job that ended before, or whose record is gone.
local function forget(job_id, job, now)
  settle(job_id, job, nil, now)
  if job.place then redis.call('HDEL', record(job_id), 'place') end
end

-- What else the record is to hold may follow.
local function close_record(job_id, state, event, now, ...)
  redis.call('HSET', record(job_id), 'state', state, 'finished_at', now, 'outcome', event, ...)
  redis.call('HDEL', record(job_id), 'place', 'message')
  redis.call('EXPIRE', record(job_id), TTL)
  redis.call('EXPIRE', P .. 'tok:' .. job_id, TTL)
end

local function finish(job_id, job, state, event, now)
  settle(job_id, job, nil, now)
  local seq = redis.call('HINCRBY', record(job_id), 'seq', 1)
  redis.call('HINCRBY', record(job_id), 'fence', 1)
  redis.call('XADD', P .. 'tok:' .. job_id, string.format('%d-0', seq), 'e', event)
  close_record(job_id, state, event, now)
  redis.call('PUBLISH', P .. 'ch:' .. job_id, string.format('%d ', seq) .. event)
end
