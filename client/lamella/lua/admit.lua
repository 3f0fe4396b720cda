-- Lets a request of an API key pass, and reserves the tokens it may use; or says when to try again, and books nothing.
-- Requests are spaced evenly over the minute, and a minute's worth may come at once (the cell rate algorithm): one number
-- says when the next one is due. Tokens count by UTC days; what a job did not use is given back by settle.lua.
-- ARGV prefix, ttl_s, key_id, tokens to reserve, paced (else the rate does not hold it up: a line of a batch)
-- Returns {ok|rate|tokens|missing, retry after ms, tokens used or reserved today, day}
local id, cost = ARGV[3], tonumber(ARGV[4])
local MINUTE, DAY = 60000, 86400000
local key = redis.call('HMGET', P .. 'apikey:' .. id, 'user', 'requests_per_minute', 'tokens_per_day')
if not key[1] then return {'missing', 0, 0, 0} end
local now = now_ms()
local day = math.floor(now / DAY)
local today, bucket = string.format('%sapiday:%s:%d', P, id, day), P .. 'apirate:' .. id
local rate, quota = ARGV[5] == 'paced' and tonumber(key[2] or nil) or nil, tonumber(key[3] or nil)
local spent = number(redis.call('GET', today))
local gap, due = 0, 0
if rate then
  gap = MINUTE / rate
  due = math.max(number(redis.call('GET', bucket)), now)
  local early = due - (MINUTE - gap) - now
  if early > 0 then return {'rate', math.ceil(early), spent, day} end
end
if quota and spent + cost > quota then return {'tokens', (day + 1) * DAY - now, spent, day} end
if rate then redis.call('SET', bucket, string.format('%.3f', due + gap), 'PX', 2 * MINUTE) end
redis.call('INCRBY', today, cost)
redis.call('EXPIRE', today, 2 * DAY / 1000)
redis.call('HINCRBY', P .. 'apiuse:' .. id, 'requests', 1)
redis.call('HSET', P .. 'apiuse:' .. id, 'last_used_at', now)
return {'ok', 0, spent + cost, day}
