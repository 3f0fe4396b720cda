-- Ties what the gateway knows of a job to it: who pays, the response it stands for, where a repeated request finds it.
-- A job that is billed already (a repeated request) gets no second bill; the reservation made for it is given back.
-- KEYS job
-- ARGV prefix, ttl_s, job_id, bill 'key day reserved' ('' = none), response record ('' = none),
--   digest of the request ('' = none), its job ids, how long to know them (s)
-- Returns 1, or 0 if there is no such job
local job_id, bill, response, digest = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if response ~= '' then redis.call('HSET', KEYS[1], 'response', response) end
if digest ~= '' then redis.call('SET', P .. 'httpretry:' .. digest, ARGV[7], 'EX', ARGV[8]) end
if bill ~= '' then
  local is_billed = redis.call('HEXISTS', KEYS[1], 'billed') == 1
  if is_billed or redis.call('HSETNX', P .. 'unbilled', job_id, bill) == 0 then
    local key, day, reserved = string.match(bill, '^(%S+) (%d+) (%d+)$')
    if key ~= '-' then redis.call('DECRBY', P .. 'apiday:' .. key .. ':' .. day, reserved) end
  end
end
return 1
