-- An answer that arrives after its account was deleted is not kept: what the account left behind has gone, and nobody could ask for it.

create or replace function public.keep_in_cache(p_cache jsonb, p_record public.usage_records, p_answer text, p_now timestamptz) returns void
language plpgsql as $$
begin
    -- The user is locked: whether the account is deleted does not change meanwhile.
    insert into public.stored_answers (kind, user_id, place, fingerprint, request_id, state, answer, created_at, expires_at)
    select 'cache', u.id, p_cache ->> 'place', p_cache ->> 'fingerprint', p_record.request_id, 'finished', p_answer, p_now,
           p_now + make_interval(secs => (p_cache ->> 'ttl_seconds')::int)
    from public.users u where u.id = p_record.user_id and u.deleted_at is null
    on conflict (user_id, kind, place) do update set
        fingerprint = excluded.fingerprint, request_id = excluded.request_id, answer = excluded.answer,
        created_at = excluded.created_at, expires_at = excluded.expires_at;
end $$;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110500::bigint
$$;

notify pgrst, 'reload schema';
