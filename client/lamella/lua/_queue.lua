-- Who waits, in which order.
--
-- For each model and class (0 high, 1 normal, 2 low) there is a fair queue:
--   ready:{model}:{class}         users with waiting jobs, by virtual time (tokens / weight); the least goes next
--   ready:{model}:{class}:{user}  that user's waiting jobs, by the order in which they came
--   held:{model}:{class}          users with waiting jobs, but as many jobs in flight as they may have
--   spent:{model}:{class}         users with none, whose virtual time is ahead of the queue's (else it says nothing)
--   queue:{model}                 v0..v2 virtual time of each class, n0..n2 jobs waiting, t0..t2 their tokens,
--                                 p1 p2 how often in a row the class was passed over, order, tf tokens in flight,
--                                 and what ended jobs tell: samples, rate, ratio, best (see _outlook.lua)
--   share:{model}:{user}          queued and sent jobs, and tokens of both
-- A job's own fields for this: user, class, cost (tokens, estimated), prompt_cost, order, deadline, place
--   (ready | sent | parked; none in records of versions without this queue), charge (virtual time taken for it).
local CLASSES = {0, 1, 2}

local function exact(value) return string.format('%.17g', value) end
local function book(model) return P .. 'queue:' .. model end
local function flight(model) return P .. 'flight:' .. model end
local function users(kind, model, class) return P .. kind .. ':' .. model .. ':' .. class end
local function line(model, class, user) return P .. 'ready:' .. model .. ':' .. class .. ':' .. user end

local function count(model, user, field, change)
  local key = P .. 'share:' .. model .. ':' .. user
  if redis.call('HINCRBY', key, field, change) == 0 then redis.call('HDEL', key, field) end
end

-- A user's limits: their own, else everybody's, else none. Also the model's, and the user's weight.
local function limits_of(user)
  local own = redis.call('HMGET', P .. 'limits:' .. user, 'queued', 'running', 'tokens', 'weight')
  local all = redis.call('HMGET', P .. 'limits', 'user_queued', 'user_running', 'user_tokens', 'model_queued')
  return {queued = tonumber(own[1] or all[1] or nil), running = tonumber(own[2] or all[2] or nil),
    tokens = tonumber(own[3] or all[3] or nil), model_queued = tonumber(all[4] or nil), weight = number(own[4], 1)}
end

local function virtual_time(model, class) return number(redis.call('HGET', book(model), 'v' .. class)) end

local function find_user(model, class, user)
  for _, kind in ipairs({'ready', 'held', 'spent'}) do
    local at = redis.call('ZSCORE', users(kind, model, class), user)
    if at then return kind, tonumber(at) end
  end
end

-- Corrects a user's virtual time. One who is not behind anyone and has no job waiting has none to correct.
local function shift_user(model, class, user, change)
  local kind, at = find_user(model, class, user)
  if not kind then return end
  if kind == 'spent' and at + change <= virtual_time(model, class) then
    redis.call('ZREM', users(kind, model, class), user)
  else
    redis.call('ZADD', users(kind, model, class), exact(at + change), user)
  end
end

local function let_go_on(model, class, user)
  local at = redis.call('ZSCORE', users('held', model, class), user)
  if not at then return end
  redis.call('ZREM', users('held', model, class), user)
  redis.call('ZADD', users('ready', model, class), at, user)
end

-- Puts a job, whose record says `ready` already, in its user's line. A user who had none waiting starts at the queue's virtual time: idling earns nothing.
local function join_line(job_id, job)
  redis.call('ZADD', line(job.model, job.class, job.user), job.order, job_id)
  redis.call('HINCRBY', book(job.model), 'n' .. job.class, 1)
  redis.call('HINCRBY', book(job.model), 't' .. job.class, job.cost)
  count(job.model, job.user, 'queued', 1)
  redis.call('SADD', P .. 'queues', job.model)
  local kind, at = find_user(job.model, job.class, job.user)
  if kind == 'ready' or kind == 'held' then return end
  local start = math.max(at or 0, virtual_time(job.model, job.class))
  if kind then redis.call('ZREM', users(kind, job.model, job.class), job.user) end
  redis.call('ZADD', users('ready', job.model, job.class), exact(start), job.user)
end

local function leave_line(job_id, job)
  local key = line(job.model, job.class, job.user)
  if redis.call('ZREM', key, job_id) == 0 then return end
  redis.call('HINCRBY', book(job.model), 'n' .. job.class, -1)
  redis.call('HINCRBY', book(job.model), 't' .. job.class, -job.cost)
  count(job.model, job.user, 'queued', -1)
  if redis.call('EXISTS', key) == 1 then return end
  local kind, at = find_user(job.model, job.class, job.user)
  if not kind then return end
  redis.call('ZREM', users(kind, job.model, job.class), job.user)
  if at > virtual_time(job.model, job.class) then
    redis.call('ZADD', users('spent', job.model, job.class), exact(at), job.user)
  end
end

local function enter_flight(job_id, job, now)
  redis.call('ZADD', flight(job.model), now, job_id)
  redis.call('HINCRBY', book(job.model), 'tf', job.cost)
  count(job.model, job.user, 'sent', 1)
end

local function leave_flight(job_id, job)
  if redis.call('ZREM', flight(job.model), job_id) == 0 then return end
  redis.call('HINCRBY', book(job.model), 'tf', -job.cost)
  count(job.model, job.user, 'sent', -1)
  local model = job.model
  if redis.call('EXISTS', users('held', model, 0), users('held', model, 1), users('held', model, 2)) == 0 then return end
  for _, class in ipairs(CLASSES) do let_go_on(model, class, job.user) end
end

-- Reads what the queue needs of a record, and the further fields that are named. Returns it, and their values.
local function read_job(job_id, ...)
  local held = redis.call('HMGET', record(job_id), 'model', 'user', 'class', 'cost', 'order', 'place', 'charge',
    'prompt_cost', 'tokens', 'attempts', 'sends', 'started_at', 'deadline', 'state', 'trace', ...)
  return {model = held[1], user = held[2] or 'anonymous', class = held[3] or '1', cost = number(held[4]),
    order = held[5], place = held[6], charge = number(held[7]), prompt_cost = number(held[8]), tokens = number(held[9]),
    attempts = number(held[10]), sends = number(held[11]), started_at = tonumber(held[12] or nil),
    deadline = tonumber(held[13] or nil), state = held[14], trace = held[15]}, unpack(held, 16)
end

-- Puts a job in flight that no line had.
local function join_flight(job_id, job, now)
  job.place = 'sent'
  redis.call('HSET', record(job_id), 'place', 'sent')
  enter_flight(job_id, job, now)
  redis.call('SADD', P .. 'queues', job.model)
end

-- Records of versions without this queue have their message in Celery already: they count as sent by the anonymous
-- user, at no cost.
local function adopt(job_id, job, now)
  if job.model and not job.order then
    job.order = redis.call('HINCRBY', book(job.model), 'order', 1)
    redis.call('HSET', record(job_id), 'user', job.user, 'class', job.class, 'cost', 0, 'order', job.order)
  end
  if job.model and not job.place and not is_final(job.state) then join_flight(job_id, job, now) end
end

local function queued_job(job_id, now)
  local job = read_job(job_id)
  adopt(job_id, job, now)
  return job
end
