-- Ends waiting jobs whose deadline has passed, the longest overdue first. A running one is its worker's to stop, which
-- reads of it with each emit.
-- KEYS deadlines     ARGV prefix, ttl_s, jobs at most
-- Returns jobs looked at
local now = now_ms()
local due, models = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, tonumber(ARGV[3])), {}
for _, job_id in ipairs(due) do
  redis.call('ZREM', KEYS[1], job_id)
  local held = redis.call('HMGET', record(job_id), 'state', 'lease_until')
  local is_held = held[1] == 'running' and number(held[2]) > now
  if held[1] and not is_final(held[1]) and not is_held then
    local job = queued_job(job_id, now)
    finish(job_id, job, 'failed', deadline_event(), now)
    models[job.model] = true
  end
end
for model in pairs(models) do dispatch(model, AT_END, now) end
return #due
