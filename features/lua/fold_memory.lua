-- Put a memory with more chunks in it in the place of the one it was made from, or do nothing.
-- KEYS[1] the user's row    KEYS[2] the user's memories (hash)
-- ARGV[1] memory version    ARGV[2] events of a chunk    ARGV[3] bytes of a memory
-- ARGV[4] chunks in the memory it was made from, 0 when there was none    ARGV[5] chunks in this one
-- ARGV[6] ordinal that the user's state begins with    ARGV[7] the memory
-- Returns 1 when written. 0: another has folded meanwhile, the user was forgotten, or Redis went
-- back to before the chunks left the tail.
local trailer = redis.call('GETRANGE', KEYS[1], -28, -13)
if #trailer < 16 then
  return 0
end
local next_ordinal, num_chunks, _, held = struct.unpack('<I4I4I4I4', trailer)
local begins = next_ordinal - num_chunks * tonumber(ARGV[2]) - held
if begins ~= tonumber(ARGV[6]) or num_chunks < tonumber(ARGV[5]) then
  return 0
end
local memory = redis.call('HGET', KEYS[2], ARGV[1])
local folded = 0
if memory and #memory == tonumber(ARGV[3]) then
  local chunks, its_begin = struct.unpack('<I4I4', memory, 5)
  if its_begin == begins then
    folded = chunks
  end
end
if folded ~= tonumber(ARGV[4]) then
  return 0
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[7])
return 1
