-- Appends a job's last events under its fence, of which the last one is terminal, and settles its record with it.
-- Repeating a call whose answer was lost is harmless: what is stored is not stored again.
-- KEYS job, stream
-- ARGV prefix, ttl_s, job_id, fence, first_seq, final state, tokens in these events, tokens used by the whole job
--   ('' = not known), event JSON...
-- Returns {ok|fenced|missing|gap, stop (0 no, 1 cancel requested, 2 deadline passed)}
local FIXED = 8
local job_id, first, events = ARGV[3], tonumber(ARGV[5]), #ARGV - FIXED
local job, fence, stored, cancel = read_job(job_id, 'fence', 'seq', 'cancel')
local now, seq = now_ms(), tonumber(stored or nil)
local stop = order(cancel, job.deadline, now)
local answer = unfit(fence, job.state, seq, ARGV[4], first, events)
if answer then return {answer, stop} end
store(KEYS[2], seq, FIXED, events)
adopt(job_id, job, now)
job.tokens = job.tokens + tonumber(ARGV[7])
settle(job_id, job, ARGV[8] ~= '' and tonumber(ARGV[8]) or nil, now)
close_record(job_id, ARGV[6], ARGV[#ARGV], now, 'seq', seq + events, 'tokens', job.tokens)
dispatch(job.model, AT_END, now)
tell(job_id, seq, FIXED, events)
return {'ok', stop}
