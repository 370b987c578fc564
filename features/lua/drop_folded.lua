-- Drop a user's waiting chunks that every live memory version has folded, and mark the hole.
-- KEYS[1] the user's row    KEYS[2] chunks (hash)    KEYS[3] memories (hash)
-- ARGV[1] the mark's field    ARGV[2] events of a chunk    ARGV[3] bytes of a memory
-- ARGV[4] the first chunk that somebody else still needs
-- ARGV[5] ordinal that the user's state began with when that was found out
-- ARGV[6], ARGV[7], ... the live memory versions; at least one
-- Returns how many chunks left.
local trailer = redis.call('GETRANGE', KEYS[1], -28, -13)
if #trailer < 16 then
  return 0
end
local next_ordinal, num_chunks, _, held = struct.unpack('<I4I4I4I4', trailer)
local begins = next_ordinal - num_chunks * tonumber(ARGV[2]) - held
if begins ~= tonumber(ARGV[5]) then
  return 0
end
local keep = math.min(tonumber(ARGV[4]), num_chunks)
for version = 6, #ARGV do
  local memory = redis.call('HGET', KEYS[3], ARGV[version])
  local folded = 0
  if memory and #memory == tonumber(ARGV[3]) then
    local chunks, its_begin = struct.unpack('<I4I4', memory, 5)
    if its_begin == begins then
      folded = chunks
    end
  end
  keep = math.min(keep, folded)
end
local dropped = 0
for number = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0'), keep - 1 do
  dropped = dropped + redis.call('HDEL', KEYS[2], number)
end
if dropped > 0 then
  redis.call('HSET', KEYS[2], ARGV[1], keep)
end
return dropped
