-- When a waiting job may start and end: an estimate. Its position counts all jobs of higher classes, its user's before
-- it, and of each other user as much as fair shares let pass in that time (every other user taken at weight 1). Tokens
-- before it, at the mean cost of those jobs and the share of their estimates that jobs really use, are divided by the
-- tokens a second that slots brought so far, times the slots; of what is in flight, half counts.
-- Returns position, ms to the start, ms to the end, ms that its first (or only possible) tokens take at best;
-- the times are -1 while there is no worker, or no job has ended yet.
local function outlook(model, class, user, cost, before, mine, least_tokens)
  local q = redis.call('HMGET', book(model), 'n0', 'n1', 'n2', 't0', 't1', 't2', 'tf', 'rate', 'ratio', 'best', 'v' .. class)
  local jobs, tokens = 0, 0
  for higher = 0, class - 1 do
    jobs, tokens = jobs + number(q[higher + 1]), tokens + number(q[higher + 4])
  end
  local here, here_tokens = number(q[class + 1]), number(q[class + 4])
  local mean = here > 0 and here_tokens / here or cost
  local kind, at = find_user(model, class, user)
  local weight = limits_of(user).weight
  local others = redis.call('ZCARD', users('ready', model, class)) - (kind == 'ready' and 1 or 0)
  local lag = math.max(0, (at or 0) - number(q[11])) * weight / math.max(mean, 1)
  local passing = math.min(math.max(here - mine, 0), math.floor((before + lag) * others / weight + 0.5))
  local position = jobs + before + passing
  tokens = tokens + (before + passing) * mean
  local slots = number(redis.call('GET', P .. 'capacity:' .. model))
  local rate, ratio = number(q[8]), number(q[9])
  if slots < 1 or rate <= 0 then return position, -1, -1, -1 end
  local start = 0
  if position + redis.call('ZCARD', flight(model)) >= slots then
    start = 1000 * ratio * (tokens + number(q[7]) / 2) / (rate * slots)
  end
  local best = 1000 * least_tokens / math.max(number(q[10]), 0.001)
  return position, math.floor(start), math.floor(start + 1000 * ratio * cost / rate), math.floor(best)
end

-- How long until a place may be free: the time one job takes, over the slots; 5 s while nothing is known.
local function retry_ms(model, share)
  local q = redis.call('HMGET', book(model), 'rate', 'ratio', 'tf')
  local slots, flying = number(redis.call('GET', P .. 'capacity:' .. model)), redis.call('ZCARD', flight(model))
  if slots < 1 or number(q[1]) <= 0 or flying == 0 then return 5000 end
  local one = 1000 * number(q[2]) * number(q[3]) / flying / (number(q[1]) * slots)
  return math.floor(math.min(math.max(one * share, 1000), 600000))
end
