-- Appends a job's last events under its fence, of which the last one is terminal, and settles its record with it.
-- Repeating a call whose answer was lost is harmless: what is stored is not stored again.
-- KEYS job, stream
-- ARGV prefix, ttl_s, job_id, fence, first_seq, final state, tokens in these events, tokens used by the whole job
--   ('' = not known), event JSON...
-- Returns {ok|fenced|missing|gap, stop (0 no, 1 cancel requested, 2 deadline passed)}
local FIXED = 8
local job_id = ARGV[3]
local job, fence, stored, cancel = read_job(job_id, 'fence', 'seq', 'cancel')
if not fence then return {'missing', 0} end
if fence ~= ARGV[4] then return {'fenced', 0} end
local now = now_ms()
local stop = 0
if cancel then stop = 1 elseif job.deadline and job.deadline <= now then stop = 2 end
local events, seq, first = #ARGV - FIXED, tonumber(stored), tonumber(ARGV[5])
local last = first + events - 1
if seq == last then return {'ok', stop} end
if job.state ~= 'running' then return {'fenced', 0} end
if seq ~= first - 1 then return {'gap', stop} end
for i = 1, events do
  redis.call('XADD', KEYS[2], string.format('%d-0', seq + i), 'e', ARGV[FIXED + i])
end
adopt(job_id, job, now)
job.tokens = job.tokens + tonumber(ARGV[7])
settle(job_id, job, ARGV[8] ~= '' and tonumber(ARGV[8]) or nil, now)
close_record(job_id, ARGV[6], ARGV[#ARGV], now, 'seq', last, 'tokens', job.tokens)
dispatch(job.model, AT_END, now)
for i = 1, events do
  redis.call('PUBLISH', P .. 'ch:' .. job_id, string.format('%d ', seq + i) .. ARGV[FIXED + i])
end
return {'ok', stop}
