-- KEYS[1]: a lease. ARGV: who holds it.
-- Returns 1 if it was held and is free now, 0 if there was nothing to free.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
