-- How waiting jobs become Celery messages: while fewer are in flight than the model's workers have slots, and one more.
-- The job leaves its line and its message is pushed in the same script, so nothing can come between.
local PASSES = 15  -- a class that was passed over so often in a row goes next, so that none starves
local LOOKS = 64  -- jobs and users that may turn out not to be sendable, in one call
local AT_END = 4  -- jobs sent at most when one has ended

-- The class that goes next, and which classes wait; `empty` are those of which nothing can be sent now.
local function next_class(model, empty)
  local q = redis.call('HMGET', book(model), 'n0', 'n1', 'n2', 'p1', 'p2')
  local waits, best = {}, nil
  for _, class in ipairs(CLASSES) do
    waits[class] = number(q[class + 1]) > 0 and not empty[class]
    if waits[class] and not best then best = class end
  end
  if waits[2] and number(q[5]) >= PASSES then return 2, waits end
  if waits[1] and number(q[4]) >= PASSES then return 1, waits end
  return best, waits
end

local function note_class(model, class, waits)
  if class > 0 then redis.call('HSET', book(model), 'p' .. class, 0) end
  for lower = class + 1, 2 do
    if waits[lower] then redis.call('HINCRBY', book(model), 'p' .. lower, 1) end
  end
end

-- Moves a waiting job into flight and charges its user for it; `at` is the user's virtual time, `sends` the messages sent
-- for the job, one that follows included.
local function take(job_id, job, now, at, weight, sends)
  local key, queue_time = users('ready', job.model, job.class), virtual_time(job.model, job.class)
  local charge = job.cost / weight
  if at and at > queue_time then
    queue_time = at
    redis.call('HSET', book(job.model), 'v' .. job.class, exact(at))
  end
  if at then redis.call('ZADD', key, exact(at + charge), job.user) end
  leave_line(job_id, job)
  enter_flight(job_id, job, now)
  redis.call('HSET', record(job_id), 'place', 'sent', 'charge', exact(charge), 'nudged_at', now, 'nudges', 0,
    'sends', sends)
  -- Users whose time has come to nothing are forgotten, a few with each job.
  local spent = users('spent', job.model, job.class)
  local old = redis.call('ZRANGEBYSCORE', spent, '-inf', exact(queue_time), 'LIMIT', 0, 4)
  if #old > 0 then redis.call('ZREM', spent, unpack(old)) end
end

local function push(job_id, job, sends, is_first)
  local list, message = P .. 'generate.' .. job.model, celery_message(job_id, job.model, sends, job.trace)
  if is_first then redis.call('RPUSH', list, message) else redis.call('LPUSH', list, message) end
end

local function is_at_limit(model, user, limit)
  return limit and number(redis.call('HGET', P .. 'share:' .. model .. ':' .. user, 'sent')) >= limit
end

-- Sends the best job of one class; false if what was first there could not be sent, and is out of the way now; nil if
-- none of the class can be sent.
local function send_first(model, class, now)
  local ready = users('ready', model, class)
  local first = redis.call('ZRANGE', ready, 0, 0, 'WITHSCORES')
  local user = first[1]
  if not user then return nil end
  local limits = limits_of(user)
  if is_at_limit(model, user, limits.running) then
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
    forget(job_id, job, now)
    return false
  end
  if job.deadline and job.deadline <= now then
    finish(job_id, job, 'failed', deadline_event(), now)
    return false
  end
  take(job_id, job, now, tonumber(first[2]), limits.weight, job.sends + 1)
  push(job_id, job, job.sends + 1, false)
  return true
end

local function dispatch(model, most, now)
  local slots = number(redis.call('GET', P .. 'capacity:' .. model))
  if slots < 1 then return 0 end
  local room = math.min(most, slots + 1 - redis.call('ZCARD', flight(model)))
  local sent, looks, empty = 0, 0, {}
  while sent < room and looks < room + LOOKS do
    looks = looks + 1
    local class, waits = next_class(model, empty)
    if not class then break end
    local is_sent = send_first(model, class, now)
    if is_sent then
      sent = sent + 1
      note_class(model, class, waits)
    end
    empty[class] = is_sent == nil
  end
  return sent
end
