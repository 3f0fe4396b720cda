-- How waiting jobs become Celery messages: while fewer are in flight than the model's workers have slots, and one more.
-- The job leaves its line and its message is pushed in the same script, so nothing can come between.
local PASSES = 15  -- a class that was passed over so often in a row goes next, so that none starves
local LOOKS = 64  -- jobs and users that may turn out not to be sendable, in one call
local AT_END = 4  -- jobs sent at most when one has ended

local function next_class(model)
  local waits, best = {}, nil
  for _, class in ipairs(CLASSES) do
    waits[class] = redis.call('EXISTS', users('ready', model, class)) == 1
    if waits[class] and not best then best = class end
  end
  if not best then return nil, waits end
  local passed = redis.call('HMGET', book(model), 'p1', 'p2')
  if waits[2] and number(passed[2]) >= PASSES then return 2, waits end
  if waits[1] and number(passed[1]) >= PASSES then return 1, waits end
  return best, waits
end

local function note_class(model, class, waits)
  if class > 0 then redis.call('HSET', book(model), 'p' .. class, 0) end
  for lower = class + 1, 2 do
    if waits[lower] then redis.call('HINCRBY', book(model), 'p' .. lower, 1) end
  end
end

-- Moves a waiting job into flight and charges its user for it.
local function take(job_id, job, now)
  local key, at = users('ready', job.model, job.class), nil
  at = redis.call('ZSCORE', key, job.user)
  local start = number(at, virtual_time(job.model, job.class))
  local charge = job.cost / weight_of(job.user)
  if start > virtual_time(job.model, job.class) then
    redis.call('HSET', book(job.model), 'v' .. job.class, exact(start))
  end
  if at then redis.call('ZADD', key, exact(start + charge), job.user) end
  leave_line(job_id, job)
  enter_flight(job_id, job, now)
  redis.call('HSET', record(job_id), 'place', 'sent', 'charge', exact(charge), 'nudged_at', now, 'nudges', 0)
  -- Users whose time has come to nothing are forgotten, a few with each job.
  local spent = users('spent', job.model, job.class)
  local old = redis.call('ZRANGEBYSCORE', spent, '-inf', exact(virtual_time(job.model, job.class)), 'LIMIT', 0, 4)
  if #old > 0 then redis.call('ZREM', spent, unpack(old)) end
end

local function push(job_id, model, is_first)
  local sends = redis.call('HINCRBY', record(job_id), 'sends', 1)
  local list, message = P .. 'generate.' .. model, celery_message(job_id, model, sends)
  if is_first then redis.call('RPUSH', list, message) else redis.call('LPUSH', list, message) end
end

local function is_at_limit(model, user)
  local limit = limit_of(user, 'running')
  return limit and number(redis.call('HGET', P .. 'share:' .. model .. ':' .. user, 'sent')) >= limit
end

-- Sends the best job of one class; false if what was first there could not be sent, and is out of the way now.
local function send_first(model, class, now)
  local ready = users('ready', model, class)
  local first = redis.call('ZRANGE', ready, 0, 0, 'WITHSCORES')
  local user = first[1]
  if is_at_limit(model, user) then
    redis.call('ZREM', ready, user)
    redis.call('ZADD', users('held', model, class), first[2], user)
    return false
  end
  local job_id = redis.call('ZRANGE', line(model, class, user), 0, 0)[1]
  if not job_id then
    redis.call('ZREM', ready, user)
    return false
  end
  local job = queued_job(job_id, now)
  if job.state ~= 'queued' then  -- gone, or ended by a version that knows no lines
    job.model, job.user, job.class, job.place = model, user, tostring(class), 'ready'
    settle(job_id, job, nil, now)
    return false
  end
  if job.deadline and job.deadline <= now then
    finish(job_id, job, 'failed', DEADLINE, now)
    return false
  end
  take(job_id, job, now)
  push(job_id, model, false)
  return true
end

local function dispatch(model, most, now)
  local slots = number(redis.call('GET', P .. 'capacity:' .. model))
  if slots < 1 then return 0 end
  local room = math.min(most, slots + 1 - redis.call('ZCARD', flight(model)))
  local sent, looks = 0, 0
  while sent < room and looks < room + LOOKS do
    looks = looks + 1
    local class, waits = next_class(model)
    if not class then break end
    if send_first(model, class, now) then
      sent = sent + 1
      note_class(model, class, waits)
    end
  end
  return sent
end
