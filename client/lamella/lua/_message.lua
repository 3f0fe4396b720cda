-- The Celery message that tells a worker of a job: what Celery itself would put on a Redis list (its message protocol 2
-- inside kombu's virtual transport). It carries the job's id and, in its headers, the trace of who asked for it; nothing
-- else. Each sending has a delivery tag of its own.
-- Its body is plain text: kombu takes that as well as base64, which takes long in Lua.
local AFTER_ID = '], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'

local function celery_message(job_id, model, sends, trace)
  local id = cjson.encode(job_id)
  return '{"body": ' .. cjson.encode('[[' .. id .. AFTER_ID)
    .. ', "content-encoding": "utf-8", "content-type": "application/json", "headers": {"lang": "py", '
    .. '"task": "lamella.generate", "id": ' .. id .. ', "shadow": null, "eta": null, "expires": null, "group": null, '
    .. '"group_index": null, "retries": 0, "timelimit": [null, null], "root_id": ' .. id .. ', "parent_id": null, '
    .. '"argsrepr": ' .. cjson.encode("('" .. job_id .. "',)") .. ', "kwargsrepr": "{}", "origin": "lamella-client", '
    .. '"ignore_result": true, "replaced_task_nesting": 0, "stamped_headers": null, "stamps": {}'
    .. (trace and ', "traceparent": ' .. cjson.encode(trace) or '') .. '}, '
    .. '"properties": {"correlation_id": ' .. id .. ', "reply_to": ' .. id .. ', "delivery_mode": 2, '
    .. '"delivery_info": {"exchange": "", "routing_key": ' .. cjson.encode('generate.' .. model) .. '}, "priority": 0, '
    .. '"body_encoding": null, "delivery_tag": ' .. cjson.encode(job_id .. '.' .. string.format('%d', sends)) .. '}}'
end
