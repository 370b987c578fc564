-- Note which sessions of a bucket's users are closed, and keep their records until they are sent.
-- KEYS[1] the bucket's markers (hash): user -> the newest session looked at, and whether it is out
-- KEYS[2] the bucket's outbox (hash): "user:session" -> the record's bytes
-- for each user: user, expected marker (empty when there is none), marker after it, how many
-- arguments follow, field, record, field, record...
-- A user whose marker differs is left alone: somebody else has swept. Returns how many were noted.
local noted = 0
local at = 1
while at <= #ARGV do
  local user, last = ARGV[at], at + 3 + tonumber(ARGV[at + 3])
  if (redis.call('HGET', KEYS[1], user) or '') == ARGV[at + 1] then
    for field = at + 4, last, 2 do
      redis.call('HSET', KEYS[2], ARGV[field], ARGV[field + 1])
    end
    redis.call('HSET', KEYS[1], user, ARGV[at + 2])
    noted = noted + 1
  end
  at = last + 1
end
return noted
