-- How a job's events are stored and told, each under its number, the first of which the worker names.

-- nil where they may be stored after event `seq`; else what to answer instead. `fence` and `state` are the record's.
local function unfit(fence, state, seq, named_fence, first, events)
  if not fence then return 'missing' end
  if fence ~= named_fence then return 'fenced' end
  if events > 0 and seq == first + events - 1 then return 'ok' end -- they are stored: that answer was lost
  if state ~= 'running' then return 'fenced' end
  if events > 0 and seq ~= first - 1 then return 'gap' end
end

-- What the worker is to do with the job: 0 go on, 1 cancel was requested, 2 the deadline passed.
local function order(cancel, deadline, now)
  if cancel then return 1 end
  return deadline and deadline <= now and 2 or 0
end

-- Events are the `count` arguments after `place`.
local function store(stream, seq, place, count)
  for i = 1, count do
    redis.call('XADD', stream, string.format('%d-0', seq + i), 'e', ARGV[place + i])
  end
end

local function tell(job_id, seq, place, count)
  for i = 1, count do
    redis.call('PUBLISH', P .. 'ch:' .. job_id, string.format('%d ', seq + i) .. ARGV[place + i])
  end
end
