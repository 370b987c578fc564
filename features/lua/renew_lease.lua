-- KEYS[1]: a lease. ARGV: who holds it, milliseconds from now until it ends.
-- Returns 1 if it was held and now ends later, 0 if somebody else holds it or nobody does.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
