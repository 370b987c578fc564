-- Read a user's row, a memory, and the waiting chunks that are not in it: all as of one instant.
-- KEYS[1] the user's row    KEYS[2] chunks (hash)    KEYS[3] memories (hash)
-- ARGV[1] the mark's field    ARGV[2] events of a chunk    ARGV[3] bytes of a memory
-- ARGV[4] memory version    ARGV[5] chunks returned at most, the newest
-- Returns uint32 bytes of the row, uint32 bytes of the memory, uint32 number of the first chunk
-- returned; then row, memory and chunks. Nothing where there is no row.
local row = redis.call('GET', KEYS[1])
if not row or #row < 28 then
  return row or ''
end
local next_ordinal, num_chunks, _, held = struct.unpack('<I4I4I4I4', row, #row - 27)
if num_chunks == 0 then
  return struct.pack('<I4I4I4', #row, 0, 0) .. row
end
local begins = next_ordinal - num_chunks * tonumber(ARGV[2]) - held
local memory = redis.call('HGET', KEYS[3], ARGV[4]) or ''
local folded = 0
if #memory == tonumber(ARGV[3]) then
  local chunks, its_begin = struct.unpack('<I4I4', memory, 5)
  if its_begin == begins then
    folded = chunks
  else
    memory = ''
  end
end
local first = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
local from = math.max(folded, first, num_chunks - tonumber(ARGV[5]))
local parts = { struct.pack('<I4I4I4', #row, #memory, from), row, memory }
for number = from, num_chunks - 1 do
  parts[#parts + 1] = redis.call('HGET', KEYS[2], number) or ''
end
return table.concat(parts)
