-- Keys that an administrator gives to a user: to one who has lost theirs, or with the scope `admin`.

-- What both have in common who may make a key. Outcomes: created, too_many (with the limit that was met), name_taken.
create function public.add_key(p jsonb, p_user_id bigint) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_key public.api_keys_new := jsonb_populate_record(null::public.api_keys_new, p -> 'key');
begin
    if (select count(*) from public.api_keys_new k where k.user_id = p_user_id and k.revoked_at is null and k.is_active) >= 50 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 50);
    elsif (select count(*) from public.api_keys_new k where k.user_id = p_user_id and k.revoked_at is null) >= 500 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 500);
    elsif exists (select from public.api_keys_new k where k.user_id = p_user_id and k.revoked_at is null and k.key_name = v_key.key_name) then
        return jsonb_build_object('outcome', 'name_taken');
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, encrypted_key, environment_tag,
                                     scope_permissions, ip_allowlist, domain_referrers, allowed_models, expiration_date, max_requests,
                                     budget_nanos, budget_window, cache_ttl_seconds)
    values (p_user_id, v_key.key_name, v_key.key_prefix, v_key.last4, v_key.key_hash, v_key.hash_secret_id, v_key.encrypted_key,
            v_key.environment_tag, v_key.scope_permissions, v_key.ip_allowlist, v_key.domain_referrers, v_key.allowed_models,
            v_key.expiration_date, v_key.max_requests, v_key.budget_nanos, v_key.budget_window, v_key.cache_ttl_seconds)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    perform public.audit_key(p, 'create', v_key, jsonb_build_object('key_name', v_key.key_name, 'environment_tag', v_key.environment_tag));
    return jsonb_build_object('outcome', 'created', 'key', public.key_view(v_key));
end $$;
revoke all on function public.add_key(jsonb, bigint) from public, anon, authenticated;
grant execute on function public.add_key(jsonb, bigint) to service_role;

-- p: user_id, maker_id, key {...}. Outcomes: those of add_key, broader, not_found.
create or replace function public.create_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_why text;
begin
    if v_user.id is null or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_why := public.broader_than(jsonb_populate_record(null::public.api_keys_new, p -> 'key'), v_maker);
    if v_why is null and exists (select from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = v_maker.id) then
        v_why := 'rate_limits';
    end if;
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    end if;
    return public.add_key(p, v_user.id);
end $$;

-- p: user_id, key {...}, and who did it. Outcomes: those of add_key, not_found.
create function public.issue_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    return public.add_key(p, v_user.id);
end $$;
comment on function public.issue_key is 'An administrator''s: no key of the user stands behind it, so nothing bounds what it may do.';
revoke all on function public.issue_key(jsonb) from public, anon, authenticated;
grant execute on function public.issue_key(jsonb) to service_role;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261130100000::bigint
$$;

notify pgrst, 'reload schema';
