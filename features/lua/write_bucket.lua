-- Write the users of one bucket, and how far their partition is applied, all of it or nothing.
-- KEYS[1] the bucket's checkpoints (hash)    KEYS[2], KEYS[3], ... row and chunks of each user;
-- after those of all users, the memories of each that is forgotten
-- ARGV[1] the checkpoint's field, "source:partition"
-- ARGV[2] the checkpoint this write was computed from, empty when there is none yet
-- ARGV[3] the checkpoint after it            ARGV[4] where a row's position starts, from its end
-- then for each user: expected position (empty when no row is expected), bytes of the old row to
-- keep (-1 replaces it, -2 drops chunks and memories as well), bytes to write, how many chunk
-- arguments follow, chunk number, records...
-- Returns 1 when written, 0 when the checkpoint differs, -n when user n's row differs.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then
  return 0
end
local from_end = tonumber(ARGV[4])
local starts = {}
local at = 5
while at <= #ARGV do
  local user = #starts + 1
  local row = KEYS[2 * user]
  if redis.call('GETRANGE', row, -from_end, -from_end + 15) ~= ARGV[at] then
    return -user
  end
  starts[user] = at
  at = at + 4 + tonumber(ARGV[at + 3])
end
local memories = 2 * #starts + 1
for user, start in ipairs(starts) do
  local keep = tonumber(ARGV[start + 1])
  if keep < 0 then
    redis.call('SET', KEYS[2 * user], ARGV[start + 2])
    if keep == -2 then
      memories = memories + 1
      redis.call('DEL', KEYS[2 * user + 1], KEYS[memories])
    end
  else
    redis.call('SETRANGE', KEYS[2 * user], keep, ARGV[start + 2])
  end
  local parts = tonumber(ARGV[start + 3])
  if parts > 0 then
    redis.call('HSET', KEYS[2 * user + 1], unpack(ARGV, start + 4, start + 3 + parts))
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
