-- What every script begins with: ARGV[1] is the key prefix, ARGV[2] how long ended jobs stay, in seconds.
local P, TTL = ARGV[1], ARGV[2]

local function number(value, default) return tonumber(value or default or 0) end
-- Whether whoever reads schemas up to `newest` reads a record of this version.
local function reads(version, newest)
  local known = tonumber(version or '')
  return known ~= nil and known >= 1 and known <= tonumber(newest)
end
local function record(job_id) return P .. 'job:' .. job_id end
local function is_final(state) return state == 'done' or state == 'failed' or state == 'cancelled' end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
