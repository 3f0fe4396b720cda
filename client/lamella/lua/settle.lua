-- Books what an ended job used, once, in place of what was reserved for it; a job that was to be forgotten goes for good.
-- A job without a usage (failed, cancelled) counts with the tokens it emitted, and its prompt if it ever ran.
-- KEYS job
-- ARGV prefix, ttl_s, job_id
-- Returns settled | running
local job_id = ARGV[3]
local bill = redis.call('HGET', P .. 'unbilled', job_id)
if not bill then return 'settled' end
local job = redis.call('HMGET', KEYS[1], 'state', 'outcome', 'tokens', 'attempts', 'prompt_cost', 'forget')
local prompt, completion = 0, 0
if job[1] then
  if not is_final(job[1]) then return 'running' end
  local usage = job[2] and cjson.decode(job[2]).usage
  if usage then
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
  elseif number(job[4]) > 0 then
    prompt, completion = number(job[5]), number(job[3])
  end
  redis.call('HSET', KEYS[1], 'billed', 1)
end
local key, day, reserved = string.match(bill, '^(%S+) (%d+) (%d+)$')
if key and key ~= '-' then
  local today = P .. 'apiday:' .. key .. ':' .. day
  redis.call('INCRBY', today, prompt + completion - reserved)
  redis.call('EXPIRE', today, 172800)
  redis.call('HINCRBY', P .. 'apiuse:' .. key, 'prompt_tokens', prompt)
  redis.call('HINCRBY', P .. 'apiuse:' .. key, 'completion_tokens', completion)
end
redis.call('HDEL', P .. 'unbilled', job_id)
if job[6] then
  redis.call('DEL', KEYS[1])
  redis.call('DEL', P .. 'tok:' .. job_id)
  redis.call('ZREM', P .. 'jobs', job_id)
end
return 'settled'
