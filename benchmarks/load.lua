-- The load of one wrk run: the same body again and again, the keys taking turns. Prints one line of JSON at the end.
local requests = {}
local turn = 0

function init(args)
   for key in string.gmatch(os.getenv("BENCH_KEYS"), "[^,]+") do
      local headers = { ["Authorization"] = "Bearer " .. key, ["Content-Type"] = "application/json" }
      requests[#requests + 1] = wrk.format("POST", nil, headers, os.getenv("BENCH_BODY"))
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function done(summary, latency, _)
   local errors = summary.errors
   local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
   io.write(string.format(
      '{"requests":%d,"seconds":%.6f,"failed":%d,"p50_us":%d,"p99_us":%d}\n',
      summary.requests, summary.duration / 1e6, failed, latency:percentile(50), latency:percentile(99)
   ))
end
