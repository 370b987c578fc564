-- Drop a user's waiting chunks that every live memory version has folded, and mark the hole.
-- KEYS[1] the user's row    KEYS[2] chunks (hash)    KEYS[3] memories (hash)
-- ARGV[1] the mark's field    ARGV[2] events of a chunk    ARGV[3] bytes of a memory
-- ARGV[4] the first chunk that somebody else still needs
-- ARGV[5] ordinal that the user's state began with when that was found out
-- ARGV[6], ARGV[7], ... the live memory versions; at least one
-- Returns how many chunks left.
local num_chunks, begins = state_of(KEYS[1], ARGV[2])
if not num_chunks then
  return 0
end
if begins ~= tonumber(ARGV[5]) then
  return 0
end
local keep = math.min(tonumber(ARGV[4]), num_chunks)
for version = 6, #ARGV do
  keep = math.min(keep, folded_of(KEYS[3], ARGV[version], ARGV[3], begins))
end
local dropped = 0
for number = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0'), keep - 1 do
  dropped = dropped + redis.call('HDEL', KEYS[2], number)
end
if dropped > 0 then
  redis.call('HSET', KEYS[2], ARGV[1], keep)
end
return dropped
